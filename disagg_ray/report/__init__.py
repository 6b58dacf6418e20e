"""What people read about finished work."""

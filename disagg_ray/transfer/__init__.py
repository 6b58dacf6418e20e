"""Registered memory and the ways between it."""

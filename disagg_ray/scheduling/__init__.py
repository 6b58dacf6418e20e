"""Who is admitted, which replica takes what, and how long it will take.

Pure state machines: no clock, thread, socket or Ray; the time is an argument.
"""

"""What runs in the driver: a request's run through the stages, the fleet of replicas, the cluster they lie on.

Everything here lives on one event loop in a thread of its own (`loop`).
"""

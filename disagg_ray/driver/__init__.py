"""What runs in the driver: the engine, a request's run through the stages, the fleet of replicas, their cluster.

All but the API (`api`, `host`) lives on one event loop in a thread of its own (`loop`).
"""

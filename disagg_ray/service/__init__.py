"""Pipelines that outlive their clients: the supervisor actor, its fleet, and the client that connects to it.

Clients and the supervisor exchange the messages of `protocol`, and nothing else.
"""

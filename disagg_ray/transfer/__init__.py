"""Bytes from pool to pool: registered memory, slots, routes, checksums, and the handoff that names them.

The only importer of Mooncake. It knows tensors, addresses and sessions, and neither models nor requests.
"""

"""The version, apart: the package's metadata is built without importing torch."""

VERSION = "0.1.0"

NUMERICS = 2
"""Raised with every change to what our own blocks compute: what was made with another number is made again."""

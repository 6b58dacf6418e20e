"""The version, apart: the package's metadata is built without importing torch."""

VERSION = "0.1.0"

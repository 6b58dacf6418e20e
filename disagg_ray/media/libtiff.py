"""Keeps libtiff from writing lines of its own to standard error, among lines of JSON: Pillow raises what counts."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

MAPS = Path("/proc/self/maps")
"""What this process has loaded."""


@cache
def silence() -> None:
    """Take away the handler by which Pillow's libtiff prints errors; Pillow itself takes that of warnings away."""
    lines = MAPS.read_text(errors="replace").splitlines() if MAPS.exists() else []
    for path in {parts[-1] for line in lines if "/libtiff" in line and len(parts := line.split(maxsplit=5)) == 6}:
        set_handler = getattr(ctypes.CDLL(path), "TIFFSetErrorHandler", None)
        if set_handler is not None:
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)

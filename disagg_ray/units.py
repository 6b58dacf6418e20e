"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(nbytes: float) -> str:
    """Return bytes with a decimal unit, as 8.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"

"""Numbers and foreign text as people read them."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""What moves a cursor, ends a line, turns the direction of writing, or cannot be encoded."""


def human_bytes(nbytes: float) -> str:
    """Return bytes with a decimal unit, as 8.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def printable(text: str, limit: int = 200) -> str:
    r"""Return text of a file or a stranger for a terminal or a log: one line of at most `limit` characters.

    Control characters, line separators, direction marks and lone surrogates become escapes as `\x1b`; what is cut off
    leaves an ellipsis.
    """
    escaped = UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"

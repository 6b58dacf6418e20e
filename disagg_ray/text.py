"""Numbers and untrusted text, formatted for people."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""What moves a cursor, ends a line, turns the direction of writing, or cannot be encoded."""
SECRET = re.compile(
    r"(://[^/\s:@]*:)[^/\s]+(?=@)|\b((?:password|passwd|token|secret|api_?key)=)[^&\s,;]+", re.IGNORECASE
)
"""Of a URL, or of what follows its `?`."""
MASK = "***"


def human_bytes(nbytes: float) -> str:
    """Return bytes with a decimal unit, as 8.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Return a duration to the precision that matters, as 38 s, 12 min or 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def medium(num_frames: int) -> Literal["video", "image"]:
    """Return what a result of this many frames is; where there is a configuration, `Task.makes` says it."""
    return "image" if num_frames == 1 else "video"


def human_size(width: int, height: int, num_frames: int) -> str:
    """Return the size of a video, as 832x480, 81 frames, or of an image, as 1328x1328."""
    return f"{width}x{height}" if num_frames == 1 else f"{width}x{height}, {num_frames} frames"


def find_repeated(names: Iterable[str]) -> str | None:
    """Return the name that is there most often, if one is there more than once."""
    name, count = next(iter(Counter(names).most_common(1)), (None, 0))
    return name if count > 1 else None


def printable(text: str, limit: int = 200) -> str:
    r"""Return untrusted text for a terminal or a log: one line of at most `limit` characters.

    Control characters, line separators, direction marks and lone surrogates become escapes as `\x1b`; an ellipsis
    stands for what is cut off.
    """
    escaped = UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def name_type(value: object) -> str:
    """Return a value's type with its article, as an int."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value: object, limit: int = 80) -> str:
    """Return a value for a message, as the configuration would have it: null, true, 'text', 5."""
    word = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return printable(mask(word), limit)


def mask(text: str) -> str:
    """Hide the passwords of URLs."""
    return SECRET.sub(lambda found: (found[1] or found[2]) + MASK, text)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most similar to one; None: none is similar (by `difflib`'s ratio)."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of a message about an unknown word: a suggestion, or nothing."""
    near = nearest(word[:100], known, cutoff)
    return f"; did you mean {printable(near)}?" if near is not None else ""

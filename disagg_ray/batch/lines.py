"""Lines of a file that somebody else may have written: none is read whole that is longer than it may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO


def read_lines(source: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, number, bytes) of each line; of one that is too long, some bytes more than `max_bytes`."""
    offset = number = 0
    while raw := source.readline(max_bytes + 1):
        number += 1
        start, offset = offset, offset + len(raw)
        if len(raw) > max_bytes:
            while raw[-1:] != b"\n" and (rest := source.readline(max_bytes)):
                offset += len(rest)
                raw = raw[: max_bytes + 1] + rest[-1:]
        yield start, number, raw


def load_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, or cannot be used: a number of too many digits, a thousand brackets.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("too deep") from error

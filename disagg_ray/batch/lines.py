"""Lines of a file that may hold anything: bounded in length, and reported where they are invalid."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from disagg_ray.text import printable

logger = logging.getLogger("disagg_ray")

MAX_SHOWN = 50
"""Invalid lines of a file that are logged one by one."""


class InvalidLines:
    """Counts the invalid lines of a file and logs the first `MAX_SHOWN`."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path

    def report(self, number: int, fault: str) -> None:
        """Count the line with a number, from 1, and say what is wrong with it."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            logger.warning("%s:%d: %s", self._path, number, printable(fault, 300))

    def log_rest(self) -> None:
        """Log how many more there were."""
        if self.count > MAX_SHOWN:
            logger.warning("%s: and %d invalid lines more", self._path, self.count - MAX_SHOWN)


def read_lines(source: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, number, bytes) of each line; a longer line is cut to `max_bytes` + 1 or + 2 bytes."""
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
    """Parse JSON; `pairs` builds each object from its (name, value) pairs.

    Raises:
        ValueError: not JSON, a number of too many digits, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

"""A file of requests: one JSON object per line, checked whole before any work, then read again line by line.

Only 40 bytes per line are kept: its offset, its number, and digests of its id, its folded id and its content.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from disagg_ray.batch.lines import read_lines
from disagg_ray.batch.request_line import BOM, MAX_LINE_BYTES, Line, fold, parse, short_digest
from disagg_ray.config.schema import Config
from disagg_ray.errors import RequestError
from disagg_ray.models.prompts import check_prompts
from disagg_ray.request import check


class RequestsFile:
    """The requests of a JSON-lines file, by index.

    Empty lines, a byte order mark and CRLF are accepted. Image paths are relative to the file's folder. A line without
    `id` gets the digest of its content; one without `seed` gets one derived from id and content, so that another run
    makes the same video.

    Raises:
        RequestError: it cannot be read, or is not a file that can be read twice.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self._config = config
        self._folder = path.absolute().parent
        try:
            self._source = path.open("rb")
            self._state = os.fstat(self._source.fileno())
        except OSError as error:
            raise RequestError(f"requests: {str(path)!r} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(self._state.st_mode):
            self._source.close()
            raise RequestError(f"requests: {str(path)!r} is no regular file, and it is read twice; write it to one")
        self._offsets, self._numbers = array("Q"), array("Q")
        self._ids, self._folds, self._contents = array("Q"), array("Q"), array("Q")

    def __enter__(self) -> RequestsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def __len__(self) -> int:
        """Return how many lines passed `scan`."""
        return len(self._offsets)

    def scan(self, report: Callable[[int, str], None]) -> None:
        """Check every line; call `report` with the number and the fault of each invalid one, which gets no index."""
        for offset, number, raw in self._lines():
            try:
                line = parse(raw, self._folder)
                check_prompts(check(line.request, self._config), self._config.model)
            except RequestError as error:
                report(number, str(error))
                continue
            self._offsets.append(offset)
            self._numbers.append(number)
            self._ids.append(short_digest(line.request.id.encode()))
            self._folds.append(short_digest(fold(line.request.id).encode()))
            self._contents.append(int(line.content, 16))
        self._drop_duplicates(report)
        self._by_id, self._by_fold = _Index(self._ids), _Index(self._folds)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (offset, number, bytes) of each line that is not empty."""
        for offset, number, raw in read_lines(self._source, MAX_LINE_BYTES):
            if raw.strip() not in (b"", BOM):
                yield offset, number, raw

    def _drop_duplicates(self, report: Callable[[int, str], None]) -> None:
        """Keep the first of lines whose ids are one file name, at least to some file systems; report the others."""
        ids = np.frombuffer(self._folds, np.uint64)
        order = np.argsort(ids, kind="stable")
        again = np.zeros(len(ids), np.bool_)
        again[1:] = ids[order][1:] == ids[order][:-1]
        bad = np.zeros(len(ids), np.bool_)
        first: dict[str, int] = {}
        for place in np.flatnonzero(again):
            if not again[place - 1]:
                first = {fold(self.line(int(order[place - 1])).request.id): int(order[place - 1])}
            index = int(order[place])
            name = self.line(index).request.id
            if (other := first.setdefault(fold(name), index)) != index:
                bad[index] = True
                report(self.number(index), self._duplicate(name, other))
        if bad.any():
            for name in ("_offsets", "_numbers", "_ids", "_folds", "_contents"):
                kept = np.frombuffer(getattr(self, name), np.uint64)[~bad]
                setattr(self, name, array("Q", kept.tobytes()))

    def _duplicate(self, name: str, index: int) -> str:
        """Return what is wrong with an id, given the line that has it first."""
        other, number = self.line(index).request.id, self.number(index)
        if name == other:
            return f"id: {name!r} is also on line {number}; ids are unique"
        return (
            f"id: {name!r} differs from {other!r} on line {number} only by case or Unicode form, and some file systems "
            f"take them for one; give one of them another id"
        )

    def line(self, index: int) -> Line:
        """Read a line again.

        Raises:
            RequestError: the file was changed since it was opened.
        """
        state = os.fstat(self._source.fileno())
        if (state.st_size, state.st_mtime_ns) != (self._state.st_size, self._state.st_mtime_ns):
            raise RequestError(f"requests: {str(self.path)!r} was changed while it was read; run again")
        self._source.seek(self._offsets[index])
        return parse(self._source.readline(), self._folder)

    def number(self, index: int) -> int:
        """Return a line's number in the file, from 1."""
        return self._numbers[index]

    def content(self, index: int) -> str:
        """Return the digest of a line's content."""
        return f"{self._contents[index]:016x}"

    def find(self, name: str) -> int | None:
        """Return the index of the line with an id."""
        return self._by_id.find(short_digest(name.encode()))

    def find_alike(self, name: str) -> int | None:
        """Return the index of the line whose id is the same file name to some file system."""
        return self._by_fold.find(short_digest(fold(name).encode()))


class _Index:
    """Finds digests in an array."""

    def __init__(self, digests: array[int]) -> None:
        self._order = np.argsort(np.frombuffer(digests, np.uint64), kind="stable")
        self._sorted = np.frombuffer(digests, np.uint64)[self._order]

    def find(self, digest: int) -> int | None:
        wanted = np.uint64(digest)
        place = int(np.searchsorted(self._sorted, wanted))
        found = place < len(self._sorted) and self._sorted[place] == wanted
        return int(self._order[place]) if found else None

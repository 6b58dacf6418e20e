"""A file of requests: one JSON object per line, checked whole before any work, then read again line by line.

Only 40 bytes per line are kept: its offset, its number, and digests of its id, its folded id and its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from disagg_ray.batch.lines import load_json, read_lines
from disagg_ray.batch.records import Picture
from disagg_ray.config.rules import whole
from disagg_ray.config.schema import Config
from disagg_ray.environment import expand_home
from disagg_ray.errors import RequestError
from disagg_ray.inputs import FIELDS, REFERENCES
from disagg_ray.models.prompts import check_prompts
from disagg_ray.request import TYPES, Request, check
from disagg_ray.text import did_you_mean, printable, shown

MAX_LINE_BYTES = 2**20
"""A longer line is refused unread; the longest prompts take far less."""
MAX_ID_BYTES = 200
"""Of a file name's 255 bytes; suffixes, also of files being written, take the rest."""
BOM = b"\xef\xbb\xbf"
KNOWN = {f.name for f in fields(Request)}
NOT_CONTENT = {"id", "priority"}
"""Fields that change nothing in the video."""


@dataclass(frozen=True)
class Line:
    """One request of the file."""

    request: Request
    content: str
    """Digest, 16 hex digits, of every field but id and priority; equal for lines that ask for the same video."""
    pictures: dict[str, Picture] = field(default_factory=dict)
    """Its image files, once they are read."""


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
            self._ids.append(_short(line.request.id.encode()))
            self._folds.append(_short(fold(line.request.id).encode()))
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
        return self._by_id.find(_short(name.encode()))

    def find_alike(self, name: str) -> int | None:
        """Return the index of the line whose id is the same file name to some file system."""
        return self._by_fold.find(_short(fold(name).encode()))


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


def parse(raw: bytes, folder: Path) -> Line:
    """Read one line. Of its fields' values, only those that name files are checked here.

    Raises:
        RequestError: it is no JSON object of a request's fields, or its id is no file name.
    """
    given = _load(raw)
    unknown = given.keys() - KNOWN
    if unknown:
        name = min(unknown)
        hint = did_you_mean(name, KNOWN) or f"; there are {', '.join(sorted(KNOWN))}"
        raise RequestError(f"{printable(name, 80)}: no such field{hint}")
    for name, value in given.items():
        if isinstance(value, float) and TYPES.get(name) is int and (number := whole(value)) is not None:
            given[name] = number  # 24.0 asks for the same video as 24
    content = _canonical(given)
    digest = f"{_short(content):016x}"
    given.setdefault("id", digest)
    check_name(given["id"], given.get("format"))
    if "seed" not in given:
        given["seed"] = _short(given["id"].encode() + b"\0" + content) >> 32
    for name in FIELDS:
        if name in given:
            given[name] = _paths(name, given[name], folder)
    return Line(Request(**given), digest)


def _paths(name: str, value: Any, folder: Path) -> Path | list[Path]:
    """Return a field's path, or paths, as seen from a folder."""
    if name == REFERENCES and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [folder / expand_home(each) for each in value]
    if name == REFERENCES or not isinstance(value, str):
        what = "list of paths; give paths of image files" if name == REFERENCES else "path; give the path of a file"
        raise RequestError(f"{name}: {shown(value)} is no {what}")
    return folder / expand_home(value)


def files_of(request: Request) -> dict[str, Path]:
    """Return the files and folders that a request names, by field; of a list by `field[index]`."""
    given = {name: getattr(request, name) for name in FIELDS}
    given |= {f"{REFERENCES}[{number}]": path for number, path in enumerate(given.pop(REFERENCES) or ())}
    return {name: path for name, path in given.items() if isinstance(path, Path)}


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise RequestError(f"the line is over {MAX_LINE_BYTES} bytes")
    try:
        given = load_json(raw.removeprefix(BOM).decode(), _unique)
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8: byte {error.start + 1} of the line is {raw[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} at character {error.colno}") from error
    except ValueError as error:  # a field twice, a number of too many digits, a thousand brackets
        raise RequestError(f"not JSON that can be used: {error}") from error
    if not isinstance(given, dict):
        raise RequestError(f'not an object: write {{"prompt": "..."}}, not a {type(given).__name__}')
    return {name: value for name, value in given.items() if value is not None}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{printable(max(names, key=names.count), 80)} is given twice")
    return given


def _canonical(given: dict[str, Any]) -> bytes:
    """Return the same bytes for lines that ask for the same video, however they are written."""
    content = [item for item in given.items() if item[0] not in NOT_CONTENT]
    return ascii(sorted(content)).encode()


def fold(name: str) -> str:
    """Return equal text for names that are one to some file systems: that differ by case or Unicode form only."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _short(data: bytes) -> int:
    """Return 8 bytes of digest as a number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def check_name(name: object, format: object) -> None:
    """Check that an id names one file of the output folder.

    Raises:
        RequestError: says why it does not.
    """
    if not isinstance(name, str):
        raise RequestError(f"id: {shown(name)} is a {type(name).__name__}; give str")
    fault = next(_faults(name, format), None)
    if fault is not None:
        raise RequestError(f"id: {shown(name)} is no file name: {fault}")


def _faults(name: str, format: object) -> Iterator[str]:
    if not name:
        yield "it is empty"
    if name.startswith("."):
        yield "it begins with a dot"
    if "/" in name:
        yield "it holds a /"
    if not name.isprintable():
        yield "it holds a character that cannot be printed"
    if len(name.encode(errors="replace")) > MAX_ID_BYTES:
        yield f"it is over {MAX_ID_BYTES} bytes"
    if format == "frames" and "." in name:
        yield "the name of a folder of frames holds no dot"

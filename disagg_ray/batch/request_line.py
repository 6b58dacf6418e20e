"""One line of a file of requests: a JSON object of a request's fields."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from disagg_ray.batch.lines import load_json
from disagg_ray.batch.records import FileState
from disagg_ray.config.rules import whole
from disagg_ray.environment import expand_home
from disagg_ray.errors import RequestError
from disagg_ray.inputs import FIELDS, REFERENCES
from disagg_ray.request import TYPES, Request
from disagg_ray.text import did_you_mean, find_repeated, name_type, printable, shown

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
    pictures: dict[str, FileState] = field(default_factory=dict)
    """Its image files, once they are read."""


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
    digest = f"{short_digest(content):016x}"
    given.setdefault("id", digest)
    check_name(given["id"], given.get("format"))
    if "seed" not in given:
        given["seed"] = short_digest(given["id"].encode() + b"\0" + content) >> 32
    for name in FIELDS:
        if name in given:
            given[name] = _paths(name, given[name], folder)
    return Line(Request(**given), digest)


def _paths(name: str, value: Any, folder: Path) -> Path | list[Path]:
    """Return a field's path, or paths, as seen from a folder."""
    if name == REFERENCES and isinstance(value, list) and all(isinstance(each, str) and each for each in value):
        return [folder / expand_home(each) for each in value]
    if name == REFERENCES or not isinstance(value, str) or not value:  # nothing, which would be the folder itself
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
        raise RequestError(f'not an object: write {{"prompt": "..."}}, not {name_type(given)}')
    return {name: value for name, value in given.items() if value is not None}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := find_repeated(name for name, _ in pairs)) is not None:
        raise ValueError(f"{printable(twice, 80)} is given twice")
    return dict(pairs)


def _canonical(given: dict[str, Any]) -> bytes:
    """Return the same bytes for lines that ask for the same video, however they are written."""
    content = [item for item in given.items() if item[0] not in NOT_CONTENT]
    return ascii(sorted(content)).encode()


def fold(name: str) -> str:
    """Return equal text for names that are one to some file systems: that differ by case or Unicode form only."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def short_digest(data: bytes) -> int:
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

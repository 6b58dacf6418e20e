"""The lines of a manifest, read back as if a stranger had written them: every field has a kind and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from disagg_ray.batch.lines import load_json
from disagg_ray.request import GivenImage, ResolvedRequest
from disagg_ray.result import StageTiming

T = TypeVar("T")

MAX_LINE_BYTES = 2**24
"""Ours hold two prompts at most; a requests file takes none over 2**20 bytes."""
MAX_SECONDS = 1e8
"""Three years: of anything that was timed."""
MAX_EPOCH_S = 1e11
MAX_STAGES = 1000


@dataclass(frozen=True)
class Picture:
    """A request's image file as it was when it was read."""

    size: int
    """Bytes."""
    mtime_ns: int
    sha256: str
    """Of its pixels."""


@dataclass(frozen=True)
class Record:
    """One line of the manifest: a finished request. Of several lines with one id the last one counts."""

    id: str
    status: str
    """done or failed."""
    content: str
    """Digest of what the request's line asked for."""
    setup: str
    """Digest of all that besides the request decides the video (`identity.identify_setup`)."""
    finished: float
    """Seconds since the epoch."""
    file: str | None = None
    """Name in the folder."""
    size: int | None = None
    """Bytes; of a folder, of all its files."""
    sha256: str | None = None
    """Of the file; of a folder, of its files' names, sizes and bytes in order of their names."""
    mtime_ns: int | None = None
    """Of the file; of a folder, the latest one in it."""
    request: ResolvedRequest | None = None
    """None when it failed before it was resolved."""
    seconds: float | None = None
    """From admission to the last byte."""
    stages: tuple[StageTiming, ...] = ()
    """Where the time went, in the order of the graph."""
    error: str | None = None
    pictures: dict[str, Picture] = field(default_factory=dict)
    """The image files that it was made from, by the request's field."""


def parse(line: bytes, *, brief: bool = False) -> Record:
    """Read one line; unknown fields are left out and missing ones are None, as another version may have written it.

    `brief` leaves `request` and `stages` out, in a third of the time.

    Raises:
        ValueError: it is no record; says why.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"it is over {MAX_LINE_BYTES} bytes")
    values = _mapping(load_json(line.decode()))
    if brief:
        values = values | {"request": None, "stages": None}
    record = _fill(Record, RECORD, values)
    if record.status == "done" and record.file is None:
        raise ValueError("file: missing, though it is done")
    return record


Check = Callable[[Any], Any]
"""Returns a value as it is to be used, or raises ValueError."""


def _number(least: float, most: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"it is not a number from {least:g} to {most:g}")
        return value

    return check


def _integer(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"it is not a whole number from {least} to {most}")
        return value

    return check


def _text(value: Any) -> str:
    """Return any text, halves of characters and NUL replaced: nothing can show those."""
    if not isinstance(value, str):
        raise ValueError("it is no text")
    return value.encode(errors="replace").decode().replace("\0", "?")


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value.encode()) > 255:
        raise ValueError("it is not a text of at most 255 printable bytes")
    return value


def _file_name(value: Any) -> str:
    if not _word(value) or "/" in value or value.startswith("."):
        raise ValueError("it is not the name of a file in the folder")
    return str(value)


def _status(value: Any) -> str:
    if value not in ("done", "failed"):
        raise ValueError("it is neither done nor failed")
    return str(value)


def _stages(value: Any) -> tuple[StageTiming, ...]:
    if not isinstance(value, list) or len(value) > MAX_STAGES:
        raise ValueError(f"it is not a list of at most {MAX_STAGES}")
    return tuple(_fill(StageTiming, TIMING, _mapping(stage)) for stage in value)


def _image(value: Any) -> GivenImage:
    if isinstance(value, list) and len(value) == 2:  # of 2026: height and width only
        value = {"height": value[0], "width": value[1], "sha256": ""}
    return _fill(GivenImage, IMAGE, _mapping(value))


def _by_name(check: Check) -> Check:
    return lambda value: {_word(name): check(each) for name, each in _mapping(value).items()}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, where an object belongs")
    return value


def _fill(cls: type[T], checks: Mapping[str, Check], values: dict[str, Any]) -> T:
    """Build a dataclass of values; one that is missing gets its default, or None."""
    found = {}
    for f in fields(cls):  # type: ignore[arg-type]
        value = values.get(f.name)
        if value is not None:
            try:
                found[f.name] = checks[f.name](value)
            except ValueError as error:
                raise ValueError(f"{f.name}: {error}") from error
        elif f.name in REQUIRED.get(cls, ()):
            raise ValueError(f"{f.name}: missing")
        elif f.default is MISSING and f.default_factory is MISSING:
            found[f.name] = None
    return cls(**found)


SECONDS, EPOCH, BYTES = _number(0, MAX_SECONDS), _number(0, MAX_EPOCH_S), _integer(0, 2**63 - 1)
NANOSECONDS, COUNT, FACTOR = _integer(-(2**63), 2**63 - 1), _integer(1, 2**31), _number(0, 1e308)
IMAGE: dict[str, Check] = {"height": COUNT, "width": COUNT, "sha256": _word}
PICTURE: dict[str, Check] = {"size": BYTES, "mtime_ns": NANOSECONDS, "sha256": _word}
TIMING: dict[str, Check] = {
    "stage": _word, "replica": _word, "queue_s": SECONDS, "pull_s": SECONDS, "started": EPOCH, "compute_s": SECONDS,
    "publish_s": SECONDS, "pulled_bytes": BYTES, "route": _word, "peak_bytes": BYTES, "encode_s": SECONDS,
    "attempts": COUNT,
}  # fmt: skip
REQUEST: dict[str, Check] = {
    "id": _word, "prompt": _text, "negative_prompt": _text, "height": COUNT, "width": COUNT, "num_frames": COUNT,
    "num_inference_steps": COUNT, "guidance_scale": FACTOR, "guidance_scale_2": FACTOR, "seed": BYTES, "fps": COUNT,
    "format": _word, "priority": _integer(-(2**31), 2**31), "images": _by_name(_image),
}  # fmt: skip
RECORD: dict[str, Check] = {
    "id": _file_name, "status": _status, "content": _word, "setup": _word, "finished": EPOCH, "file": _file_name,
    "size": BYTES, "sha256": _word, "mtime_ns": NANOSECONDS, "seconds": SECONDS, "stages": _stages, "error": _text,
    "request": lambda value: _fill(ResolvedRequest, REQUEST, _mapping(value)),
    "pictures": _by_name(lambda value: _fill(Picture, PICTURE, _mapping(value))),
}  # fmt: skip
REQUIRED: dict[type, tuple[str, ...]] = {
    Record: ("id", "status", "finished"), Picture: tuple(PICTURE), StageTiming: ("stage", "replica"),
}  # fmt: skip

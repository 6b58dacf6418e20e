"""The lines of a manifest; when read back, every field is checked for its type and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from disagg_ray.batch.lines import load_json
from disagg_ray.inputs import GivenImage
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import StageTiming

T = TypeVar("T")

MAX_LINE_BYTES = 2**24
"""A line of ours has two prompts at most, from a requests file whose lines have at most 2**20 bytes."""
MAX_STAGES = 1000


@dataclass(frozen=True)
class FileState:
    """What a file or folder was when it was read or written."""

    size: int
    """Bytes; of a folder: the sum of its files."""
    mtime_ns: int
    """Time of change; of a folder: the latest in it."""
    sha256: str
    """Of an image file that was read: of its pixels; of a folder: over names, sizes and bytes of its files, sorted by
    name."""


@dataclass(frozen=True)
class Record:
    """One line of the manifest: a finished request. The last line of an id counts."""

    id: str
    status: str
    """done or failed."""
    content: str
    """Digest of the request's line (`request_line.Line.content`)."""
    setup: str
    """Digest of model, options and versions (`identity.identify_setup`)."""
    finished: float
    """Seconds since the epoch."""
    file: str | None = None
    """Name in the folder."""
    size: int | None = None
    """As of `FileState`; the next two too."""
    sha256: str | None = None
    mtime_ns: int | None = None
    request: ResolvedRequest | None = None
    """None if it failed before it was resolved."""
    seconds: float | None = None
    """From admission to the last byte."""
    stages: tuple[StageTiming, ...] = ()
    """In the order of the graph."""
    error: str | None = None
    pictures: dict[str, FileState] = field(default_factory=dict)
    """Its image files, by the request's field."""
    sound: FileState | None = None
    """The wav file beside `file`, if there is one; records of older versions leave it out."""
    sound_file: str | None = None
    """Its name in the folder; records of older versions leave it out."""


def parse(line: bytes, *, brief: bool = False) -> Record:
    """Read one line, which another version may have written: ignore unknown fields, set missing ones to None.

    `brief` leaves `request` and `stages` out, which is three times as fast.

    Raises:
        ValueError: not a record; says why.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"over {MAX_LINE_BYTES} bytes")
    values = _mapping(load_json(line.decode()))
    if brief:
        values = values | {"request": None, "stages": None}
    record = _fill(Record, RECORD, values)
    if record.status == "done" and record.file is None:
        raise ValueError("file: missing, though its status is done")
    return record


Check = Callable[[Any], Any]
"""Returns a value in the form to use, or raises ValueError."""


def _number(least: float, most: float, kind: type = float) -> Check:
    """Return a check for a number within bounds; of `kind` int: a whole one."""

    def check(value: Any) -> Any:
        if type(value) not in (int, kind) or not least <= value <= most:
            raise ValueError(f"not {'a whole' if kind is int else 'a'} number from {least:g} to {most:g}")
        return value

    return check


def _text(value: Any) -> str:
    """Return any text; lone surrogates and NUL, which cannot be shown, become `?`."""
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value.encode(errors="replace").decode().replace("\0", "?")


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value.encode()) > 255:
        raise ValueError("not a text of at most 255 printable bytes")
    return value


def _file_name(value: Any) -> str:
    if not _word(value) or "/" in value or value.startswith("."):
        raise ValueError("not the name of a file in the folder")
    return str(value)


def _status(value: Any) -> str:
    if value not in ("done", "failed"):
        raise ValueError("neither done nor failed")
    return str(value)


def _stages(value: Any) -> tuple[StageTiming, ...]:
    if not isinstance(value, list) or len(value) > MAX_STAGES:
        raise ValueError(f"not a list of at most {MAX_STAGES}")
    return tuple(_fill(StageTiming, TIMING, stage) for stage in value)


def _image(value: Any) -> GivenImage:
    if isinstance(value, list) and len(value) == 2:  # the older form: height and width
        value = {"height": value[0], "width": value[1], "sha256": ""}
    return _fill(GivenImage, IMAGE, value)


def _by_name(check: Check) -> Check:
    return lambda value: {_word(name): check(each) for name, each in _mapping(value).items()}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"not an object but a {type(value).__name__}")
    return value


def _fill(cls: type[T], checks: Mapping[str, Check], value: Any) -> T:
    """Build a dataclass from an object; a missing field gets its default, or None."""
    values, found = _mapping(value), {}
    for f in fields(cls):  # type: ignore[arg-type]
        if values.get(f.name) is not None:
            try:
                found[f.name] = checks[f.name](values[f.name])
            except ValueError as error:
                raise ValueError(f"{f.name}: {error}") from error
        elif f.name in REQUIRED.get(cls, ()):
            raise ValueError(f"{f.name}: missing")
        elif f.default is MISSING and f.default_factory is MISSING:
            found[f.name] = None
    return cls(**found)


SECONDS, EPOCH, FACTOR = _number(0, 1e8), _number(0, 1e11), _number(0, 1e308)
BYTES, NANOSECONDS = _number(0, 2**63 - 1, int), _number(-(2**63), 2**63 - 1, int)
COUNT, PRIORITY = _number(1, 2**31, int), _number(-(2**31), 2**31, int)
IMAGE: dict[str, Check] = {"height": COUNT, "width": COUNT, "sha256": _word}
STATE: dict[str, Check] = {"size": BYTES, "mtime_ns": NANOSECONDS, "sha256": _word}
TIMING: dict[str, Check] = {
    "stage": _word, "replica": _word, "queue_s": SECONDS, "pull_s": SECONDS, "started": EPOCH, "compute_s": SECONDS,
    "publish_s": SECONDS, "pulled_bytes": BYTES, "route": _word, "peak_bytes": BYTES, "encode_s": SECONDS,
    "attempts": COUNT, "num_ranks": COUNT, "num_gpus": FACTOR,
}  # fmt: skip
REQUEST: dict[str, Check] = {
    "id": _word, "prompt": _text, "negative_prompt": _text, "height": COUNT, "width": COUNT, "num_frames": COUNT,
    "num_inference_steps": COUNT, "guidance_scale": FACTOR, "guidance_scale_2": FACTOR, "seed": BYTES, "fps": COUNT,
    "format": _word, "priority": PRIORITY, "conditioning_scale": FACTOR,
    "stg_scale": FACTOR, "audio_stg_scale": FACTOR, "stg_block": BYTES,
    "audio_guidance_scale": FACTOR, "modality_scale": FACTOR, "audio_modality_scale": FACTOR,
    "guidance_rescale": FACTOR, "audio_guidance_rescale": FACTOR, "images": _by_name(_image),
}  # fmt: skip
RECORD: dict[str, Check] = {
    "id": _file_name, "status": _status, "content": _word, "setup": _word, "finished": EPOCH, "file": _file_name,
    "size": BYTES, "sha256": _word, "mtime_ns": NANOSECONDS, "seconds": SECONDS, "stages": _stages, "error": _text,
    "request": partial(_fill, ResolvedRequest, REQUEST), "pictures": _by_name(partial(_fill, FileState, STATE)),
    "sound": partial(_fill, FileState, STATE), "sound_file": _file_name,
}  # fmt: skip
REQUIRED: dict[type, tuple[str, ...]] = {
    Record: ("id", "status", "finished"), FileState: tuple(STATE), StageTiming: ("stage", "replica"),
}  # fmt: skip

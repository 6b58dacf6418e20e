"""Bodies of requests into what a model is asked for; what cannot be is refused, and the field named."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from disagg_ray.config.model import ModelConfig
from disagg_ray.config.schema import Config
from disagg_ray.config.traits import FORMATS, OF_VIDEO
from disagg_ray.errors import DisaggError, RequestError
from disagg_ray.http.files import MEDIA_TYPES, by_field
from disagg_ray.http.schema import SHOWN, ApiError, CreateVideo
from disagg_ray.http.store import Job
from disagg_ray.inputs import OTHERS, REFERENCES
from disagg_ray.models.prompts import check_prompts
from disagg_ray.request import MAX_PRIORITY, Request, ResolvedRequest, resolve
from disagg_ray.text import printable, shown

FILES = {
    "input_reference": "image", "last_image": "last_image", "video": "video", "mask": "mask",
    "reference_images": "reference_images", "image": "images",
}  # fmt: skip
"""Fields of a body that are files, and of the request that they become; of `images`, the model decides which."""
LISTS = ("reference_images", "image")
"""Those of which there may be several."""
PARAMS = {"height x width": "size", "height": "size", "width": "size", "image": "input_reference"}
"""Fields of a body, by those of the request that they decide."""
FIELD = re.compile(r"(?:invalid )?(height x width|\w+)(?:\[\d+\])?[=:]")
"""How messages about a request begin."""
SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


@dataclass(frozen=True)
class Upload:
    """A file as it was sent."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Asked:
    """A request that the model can serve."""

    prompt: str
    settings: dict[str, Any]
    size: str
    seconds: str
    length_s: float
    """Of the video; 0 of an image."""


def files_of(model: ModelConfig) -> list[str]:
    """Return the fields of a body that are files which a model takes."""
    return [field for field, name in FILES.items() if name in model.traits.takes]


def place_of(field: str, number: int) -> str:
    """Return a file's place in the request: its field, and of several `field[number]`."""
    return f"{FILES[field]}[{number}]" if field in LISTS else FILES[field]


def upload_of(field: str, url: str) -> Upload:
    """Return the file of a data URL; no other URL is fetched for a stranger.

    Raises:
        ApiError: it is none.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ApiError(400, f"{field}: its URL is no data URL; give data:image/png;base64,...", param=field)
    try:
        return Upload(field, base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise ApiError(400, f"{field}: its URL is not base64: {error}", param=field) from error


def fingerprint_remix(job_id: str, prompt: str) -> str:
    """Return a digest by which a repeated remix is known: what it was made of may be gone by then."""
    return hashlib.sha256(json.dumps([job_id, prompt]).encode()).hexdigest()


def fingerprint(body: CreateVideo, uploads: Mapping[str, Upload]) -> str:
    """Return a digest by which a repeated body is known; `uploads` by their places in the request."""
    fields = body.model_dump(exclude=set(FILES), exclude_none=True)
    digests = {place: hashlib.sha256(upload.data).hexdigest() for place, upload in uploads.items()}
    return hashlib.sha256(json.dumps([fields, digests], sort_keys=True).encode()).hexdigest()


def repeated(job: Job, made_of: str) -> Job:
    """Return the job that a repeated POST made before.

    Raises:
        ApiError: the body is another one.
    """
    if job.fingerprint != made_of:
        raise ApiError(
            409, "Idempotency-Key: another body was sent under this key; give another key", param="Idempotency-Key",
            code="idempotency_conflict",
        )  # fmt: skip
    return job


def check_body(body: CreateVideo, uploads: Mapping[str, Upload], config: Config, priority: int) -> Asked:
    """Check a body and its uploads, by their places in the request, as every request is checked.

    `priority` is its key's.

    Raises:
        ApiError: it cannot be served; names the field.
    """
    fields: dict[str, Any] = body.model_dump(
        include={
            "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_scale_2", "audio_guidance_scale",
            "seed", "fps", "format", *OTHERS,
        }
    )  # fmt: skip
    _check_number(uploads, config)
    num_frames = _num_frames(body, config)
    with ExitStack() as stack:
        names: dict[str, str] = {}
        paths: dict[str, str] = {}
        for place, upload in uploads.items():
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="disagg_ray-"))
            file.write(upload.data)
            file.flush()
            paths[place], names[file.name] = file.name, upload.name
        fields |= _sides(body) | by_field(paths)
        request = Request(body.prompt, num_frames=num_frames, priority=body.priority, **fields)
        try:
            resolved, _ = resolve(request, config)
            check_prompts(resolved, config.model)
        except DisaggError as error:
            raise _answer(error, names, body) from error
    if resolved.format not in MEDIA_TYPES:
        served = ", ".join(name for name in FORMATS[config.model.traits.makes] if name in MEDIA_TYPES)
        raise ApiError(400, f"format: {resolved.format} is not served; give {served}", param="format")
    return _ask(body, request, resolved, priority, is_video=config.model.traits.makes == "video")


def _ask(body: CreateVideo, request: Request, resolved: ResolvedRequest, priority: int, *, is_video: bool) -> Asked:
    """Return what a checked request asks for; an image has no length."""
    names = [name for name in (*SHOWN, "height", "width") if is_video or name not in OF_VIDEO]
    settings = {name: getattr(resolved, name) for name in names}
    settings |= {name: getattr(request, name) for name in OTHERS}
    settings["priority"] = max(-MAX_PRIORITY, min(MAX_PRIORITY, resolved.priority + priority))
    length_s = resolved.num_frames / resolved.fps if is_video else 0.0
    seconds = str(body.seconds).strip() if body.seconds is not None else f"{length_s:g}"
    return Asked(resolved.prompt, settings, f"{resolved.width}x{resolved.height}", seconds, length_s)


def _check_number(uploads: Mapping[str, Upload], config: Config) -> None:
    """Refuse more files in a field than the model takes."""
    number, most = sum(place.startswith(f"{REFERENCES}[") for place in uploads), config.model.traits.max_references
    if 0 < most < number:
        message = f"{REFERENCES}: {number} were sent, and the model takes at most {most}; send fewer"
        raise ApiError(400, message, param=REFERENCES)


def _answer(error: DisaggError, names: Mapping[str, str], body: CreateVideo) -> ApiError:
    """Return the answer to a refused request: files by the names that they were sent with, fields as in the body."""
    message = str(error)
    for path, name in names.items():
        message = message.replace(repr(path), shown(name))
    match = FIELD.match(message)
    field = match[1] if match is not None else ""
    param = "seconds" if field == "num_frames" and body.seconds is not None else PARAMS.get(field, field)
    if param != field and param:
        message = f"{param}: {message}"
    return ApiError(400 if isinstance(error, RequestError) else 500, printable(message, 1000), param=param or None)


def _sides(body: CreateVideo) -> dict[str, int]:
    if body.size is None:
        return {}
    match = SIZE.fullmatch(body.size)
    if match is None:
        raise ApiError(400, f"size: {shown(body.size)} is not WIDTHxHEIGHT, as 832x480", param="size")
    return {"width": int(match[1]), "height": int(match[2])}


def _num_frames(body: CreateVideo, config: Config) -> int | None:
    """Return the number of frames that comes nearest to the seconds."""
    if body.seconds is None:
        return body.num_frames
    if body.num_frames is not None:
        raise ApiError(400, "num_frames: given beside seconds; give one of the two", param="num_frames")
    try:
        seconds = float(body.seconds)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise ApiError(400, f"seconds: {shown(body.seconds)} is not a positive number", param="seconds")
    fps = body.fps if body.fps is not None else config.defaults.fps
    step = config.model.traits.frames_step or 1
    return max(1, round((seconds * max(1, min(fps, 240)) - 1) / step) * step + 1)

"""A request: its fields with their rules, and every check that needs no model."""

from __future__ import annotations

import logging
import math
import re
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from disagg_ray.config.rules import (
    Check,
    Count,
    Fps,
    Guidance,
    Rule,
    Section,
    between,
    checks,
    enforce,
    kinds,
    real,
    whole,
)
from disagg_ray.config.schema import Config
from disagg_ray.config.traits import FORMATS, OF_SOUND, OF_VIDEO, medium_rules, shape_rules, sound_rules
from disagg_ray.errors import RequestError
from disagg_ray.inputs import OTHERS, GivenImage, check_inputs, read_inputs, references
from disagg_ray.media.video import MAX_GIF_FPS, MAX_SIDES, ImageSource, Picture
from disagg_ray.text import name_type, shown

SILENT = ("gif", "frames")
"""Formats of a video that hold no sound."""
LEFT_OUT = "request %s: %s holds no sound, so it is left out; ask for mp4, or for npy with a wav file beside it"
logger = logging.getLogger("disagg_ray")

MAX_SEED = 2**63 - 1
MAX_BITS = 8192
"""Of any whole number."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_PRIORITY = 1000

Text = Annotated[
    str,
    Rule(
        lambda text: not LONE_SURROGATE.search(text),
        "must be whole Unicode text; it holds half of a character (a lone surrogate)",
    ),
]
Name = Annotated[
    str,
    Rule(lambda name: 1 <= len(name) <= 200 and name.isprintable(), "must be 1 to 200 printable characters"),
]


@dataclass(frozen=True)
class Request(Section):
    """One video or image to generate. A field left None gets the configuration's default.

    Raises RequestError (a ValueError) when it is resolved against a configuration it does not fit.
    """

    prompt: Annotated[Text, Rule(str.strip, "must say what to show")] = ""
    """What to show."""
    negative_prompt: Text | None = None
    """What CFG steers away from."""
    image: ImageSource | None = None
    """First frame, for a model of task i2v, flf2v or ti2v; what is edited, for one of edit: a PIL image or a file."""
    last_image: ImageSource | None = None
    """Last frame, for a first-and-last-frame model."""
    video: str | Path | None = None
    """Control video, for a model of task vace: an mp4, gif or webp file, or a folder of images, its frames by name."""
    mask: ImageSource | None = None
    """Of video, black where its pixels stay and white where they are made: a video of as many frames, or one image."""
    reference_images: list[ImageSource] | None = None
    """What is to appear, for a model of task vace, or is edited, for one of edit_plus: a list of images or files."""
    conditioning_scale: Guidance | None = None
    """How much video and reference_images count, for a model of task vace; left out: 1."""
    height: int | None = None
    """Pixels, a multiple of 16 (ti2v: 32). With an image (of several: the last) or a video and left out: its aspect at
    the default area."""
    width: int | None = None
    """Pixels, a multiple of 16 (ti2v: 32)."""
    num_frames: int | None = None
    """Frames, 4k + 1; not of an image. With video and left out: as many as it has, at most the default."""
    num_inference_steps: Count | None = None
    """Denoising steps; with model.sigmas there are as many as sigmas."""
    guidance_scale: Guidance | None = None
    """CFG scale; 1 or less turns CFG off."""
    guidance_scale_2: Guidance | None = None
    """CFG scale of the second, low-noise transformer."""
    audio_guidance_scale: Guidance | None = None
    """CFG scale of the sound, of a model that makes some; None: guidance_scale."""
    modality_scale: Guidance | None = None
    """Of a model with sound: steers video away from what it were without its sound; left out: 1, which is off."""
    audio_modality_scale: Guidance | None = None
    """The same of sound and its video; left out: modality_scale."""
    stg_scale: Guidance | None = None
    """Of a model with sound: steers video away from what it were if one block did not attend; left out: 0, off."""
    audio_stg_scale: Guidance | None = None
    """The same of sound; left out: stg_scale."""
    stg_block: Annotated[int, between(0, 47)] | None = None
    """Number of that block of the transformer, from 0; left out: 29."""
    guidance_rescale: Annotated[float, between(0, 1)] | None = None
    """Of a model with sound: share of the guided prediction that gets the unguided one's deviation; left out: 0."""
    audio_guidance_rescale: Annotated[float, between(0, 1)] | None = None
    """The same of sound; left out: guidance_rescale."""
    seed: Annotated[int, between(0, MAX_SEED)] | None = None
    """Of the initial noise, drawn on the CPU; None: a random one, which the result names."""
    fps: Fps | None = None
    """Frames per second of the written video; not of an image. With sound it decides how long that is."""
    format: str | None = None
    """Of a video mp4 (the default), gif, frames (a folder of png files) or npy (float32 frames); of an image png (the
    default), webp (lossless), jpg or npy."""
    priority: Annotated[int, between(-MAX_PRIORITY, MAX_PRIORITY)] = 0
    """Higher goes first; equals go in order, and every eighth turn is the oldest's."""
    id: Name = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Name of the request in logs and files."""


TYPES = {name: kind.type for name, kind in kinds(Request).items() if kind.type in (str, int, float)}
"""Of each field but the images."""
NAMES_OF_TYPES = {str: "text", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class ResolvedRequest:
    """A request with every default filled in and every check passed; images are passed beside it."""

    id: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    seed: int
    fps: int
    format: str
    priority: int
    images: dict[str, GivenImage]
    """By name."""
    conditioning_scale: float = 1.0
    audio_guidance_scale: float | None = None
    modality_scale: float = 1.0
    audio_modality_scale: float | None = None
    stg_scale: float = 0.0
    audio_stg_scale: float | None = None
    stg_block: int = 29
    guidance_rescale: float = 0.0
    audio_guidance_rescale: float | None = None

    @property
    def guided(self) -> bool:
        """Whether CFG runs at all; as in diffusers, the first scale decides for two transformers."""
        return max(self.guidance_scale, self.sound_guidance_scale) > 1

    @property
    def num_passes(self) -> int:
        """Forward passes of the transformer: as many as steps, twice that with CFG."""
        return self.num_inference_steps * (2 if self.guided else 1)

    @property
    def sound_guidance_scale(self) -> float:
        return self.audio_guidance_scale or self.guidance_scale  # as in diffusers

    @property
    def num_references(self) -> int:
        return len(references(self.images))

    @property
    def image_pixels(self) -> int:
        return max((image.height * image.width for image in self.images.values()), default=0)


def resolve(request: Request, config: Config) -> tuple[ResolvedRequest, dict[str, Picture]]:
    """Fill in a request's defaults and check it; return it with its input images, upright and RGB.

    Raises:
        RequestError: names the field, the value and the remedy.
    """
    request = _check_fields(request, config)
    inputs = read_inputs(request, config)
    request = replace(request, num_frames=inputs.num_frames)
    resolved = _fill(request, config, inputs.size, inputs.about)
    if config.model.traits.sound_rate is not None and resolved.format in SILENT:
        logger.info(LEFT_OUT, resolved.id, resolved.format)
    return resolved, inputs.pictures


def check(request: Request, config: Config) -> ResolvedRequest:
    """Check what `resolve` checks, but open no image: of an image file only that it exists and is not too large.

    Where an image or a video decides the size, the returned size is a placeholder.

    Raises:
        RequestError: names the field, the value and the remedy.
    """
    request, size = _check_fields(request, config), (config.defaults.height, config.defaults.width)
    if check_inputs(request, config):
        size = (config.model.traits.multiple,) * 2
    return _fill(request, config, (_or(request.height, size[0]), _or(request.width, size[1])), {})


def _check_fields(request: Request, config: Config) -> Request:
    """Return a request whose numbers are Python's own: NumPy's are taken too, and 24.0 where 24 is meant."""
    given = {name: _take(name, getattr(request, name), kind) for name, kind in TYPES.items()}
    taken = replace(request, **given)
    fields = {name: getattr(taken, name) for name in (*OF_VIDEO, *OF_SOUND)}
    enforce(medium_rules(config.model, fields, taken.format), RequestError)
    steps = taken.num_inference_steps
    enforce(shape_rules(config.model.traits, taken.height, taken.width, taken.num_frames, steps), RequestError)
    enforce(checks(taken, null=""), RequestError)
    return taken


def _take(name: str, value: Any, kind: type) -> Any:
    if value is None and kinds(Request)[name].optional:
        return None
    taken: Any = real(value) if kind is float else whole(value) if kind is int else None
    if kind is str and isinstance(value, str):
        taken = str(value)
    if taken is None:
        remedy = f"must be {NAMES_OF_TYPES[kind]}, not {name_type(value)}"
        raise RequestError(f"invalid {name}={shown(value)}: {remedy}")
    if isinstance(taken, int) and taken.bit_length() > MAX_BITS:  # it could not even be printed
        raise RequestError(f"invalid {name}: must be a number of at most {MAX_BITS} bits")
    return taken


def _fill(request: Request, config: Config, size: tuple[int, int], images: dict[str, GivenImage]) -> ResolvedRequest:
    """Fill in the defaults and check the result against the configuration; the size is (height, width)."""
    defaults = vars(config.defaults) | {"height": size[0], "width": size[1]}
    defaults["num_inference_steps"] = len(config.model.sigmas) or config.defaults.num_inference_steps
    resolved = ResolvedRequest(
        id=request.id,
        prompt=request.prompt,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        format=_or(request.format, FORMATS[config.model.traits.makes][0]),
        priority=request.priority,
        images=images,
        **{name: value for name in OTHERS if (value := getattr(request, name)) is not None},
        **{name: _or(getattr(request, name), default) for name, default in defaults.items()},
    )
    enforce(_rules(resolved, config), RequestError)
    return resolved


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rules(request: ResolvedRequest, config: Config) -> Iterator[Check]:
    """Yield what a request must be for this configuration."""
    limits, model, scale = config.limits, config.model, config.output.scale
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        remedy = (
            f"must be at most limits.max_prompt_chars={limits.max_prompt_chars} characters, not {len(text)}: the model "
            f"reads {model.max_sequence_length} tokens, and a longer text is refused, never cut off unseen"
        )
        yield name, text, len(text) <= limits.max_prompt_chars, remedy
    steps = request.num_inference_steps
    yield from config.size_rules(request.height, request.width, request.num_frames, steps)
    remedy = f"must be left out: model.sigmas holds {len(model.sigmas)}"
    yield "num_inference_steps", steps, steps == len(model.sigmas) or not model.sigmas, remedy
    ok = request.guidance_scale_2 is None or config.defaults.guidance_scale_2 is not None
    yield "guidance_scale_2", request.guidance_scale_2, ok, "must be left out: this model has one transformer"
    yield from sound_rules(model.traits, request.num_frames, request.fps)
    most = MAX_SIDES.get(request.format, math.inf)
    scaled = f" after output.scale={scale}" if scale > 1 else ""
    remedy = f"must be at most the {most} pixels{scaled} that {request.format} can hold; or ask for npy"
    for name, pixels in (("height", request.height), ("width", request.width)):
        yield name, pixels, pixels * scale <= most, remedy
    ok = request.format != "gif" or request.fps <= MAX_GIF_FPS
    yield "fps", request.fps, ok, f"must be at most {MAX_GIF_FPS}, which is all a gif can show; or use mp4"

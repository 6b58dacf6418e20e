"""What a user asks for, and every check on it that needs no model."""

from __future__ import annotations

import math
import operator
import re
import secrets
import sys
import uuid
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_ray.config.rules import MULTIPLE
from disagg_ray.config.schema import Config
from disagg_ray.errors import RequestError
from disagg_ray.media.video import MAX_GIF_FPS, MAX_SIDES, check_image_file, digest_pixels, load_image
from disagg_ray.text import did_you_mean, printable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("mp4", "gif", "png", "npy")
MAX_SEED = 2**63 - 1
MAX_BITS = 8192
"""Of a whole number, whatever it is for."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_PRIORITY = 1000
IMAGES_OF: dict[str, tuple[str, ...]] = {"t2v": (), "i2v": ("image",), "flf2v": ("image", "last_image")}
"""Images that a model of a task needs."""


@dataclass(frozen=True)
class Request:
    """One video to generate. A field left None gets the configuration's default.

    Raises RequestError (a ValueError) when it is resolved against a configuration it does not fit.
    """

    prompt: str = ""
    """What the video shows."""
    negative_prompt: str | None = None
    """What guidance steers away from."""
    image: Image | str | Path | None = None
    """First frame, for an image-to-video model: a PIL image or a file."""
    last_image: Image | str | Path | None = None
    """Last frame, for a first-and-last-frame model."""
    height: int | None = None
    """Pixels, a multiple of 16. For an image model and left out: the image's aspect at the model's area."""
    width: int | None = None
    """Pixels, a multiple of 16."""
    num_frames: int | None = None
    """Frames, 4k + 1."""
    num_inference_steps: int | None = None
    """Denoising steps; with model.sigmas there are as many as sigmas."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 or less turns it off."""
    guidance_scale_2: float | None = None
    """Guidance of Wan 2.2's low-noise transformer."""
    seed: int | None = None
    """Of the initial noise, drawn on the CPU; None: a random one, told in the result."""
    fps: int | None = None
    """Frames a second of the written video."""
    format: str = "mp4"
    """mp4, gif, png (a folder) or npy (float32 frames)."""
    priority: int = 0
    """Higher goes first; equals go in order, and every eighth turn is the oldest's."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Name of this request in logs and files."""


@dataclass(frozen=True)
class GivenImage:
    """A conditioning image as given: upright, RGB, not resized."""

    height: int
    width: int
    sha256: str
    """Of its pixels."""


@dataclass(frozen=True)
class ResolvedRequest:
    """A request with every default filled in and every check passed; images travel beside it."""

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

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs at all; as in diffusers, the first scale decides for both."""
        return self.guidance_scale > 1

    @property
    def image_pixels(self) -> int:
        return max((image.height * image.width for image in self.images.values()), default=0)


def resolve(request: Request, config: Config) -> tuple[ResolvedRequest, dict[str, Image]]:
    """Fill in a request's defaults and check it; return it with its conditioning images, upright and RGB.

    Raises:
        RequestError: names the field, the value and the remedy.
    """
    request = _as_given(request)
    given = _given_images(request, config)
    images = {name: load_image(image, name, config.limits.max_image_pixels) for name, image in given.items()}
    shown = {name: GivenImage(image.height, image.width, digest_pixels(image)) for name, image in images.items()}
    resolved = _fill(request, config, _size(request, config, images.get("image")), shown)
    _check(resolved, config)
    return resolved, images


def check(request: Request, config: Config) -> ResolvedRequest:
    """Check what `resolve` checks, but of an image file only that it is there and not too large: none is opened.

    The size of what it returns is a stand-in where an image decides it.

    Raises:
        RequestError: names the field, the value and the remedy.
    """
    request = _as_given(request)
    given = _given_images(request, config)
    for name, image in given.items():
        check_image_file(image, name)
    height, width = (MULTIPLE, MULTIPLE) if given else (config.defaults.height, config.defaults.width)
    resolved = _fill(request, config, (_or(request.height, height), _or(request.width, width)), {})
    _check(resolved, config)
    return resolved


def _fill(request: Request, config: Config, size: tuple[int, int], images: dict[str, GivenImage]) -> ResolvedRequest:
    """Fill in the defaults; the size is (height, width)."""
    defaults = config.defaults
    return ResolvedRequest(
        id=request.id,
        prompt=request.prompt,
        negative_prompt=_or(request.negative_prompt, defaults.negative_prompt),
        height=size[0],
        width=size[1],
        num_frames=_or(request.num_frames, defaults.num_frames),
        num_inference_steps=_or(request.num_inference_steps, len(config.model.sigmas) or defaults.num_inference_steps),
        guidance_scale=_or(request.guidance_scale, defaults.guidance_scale),
        guidance_scale_2=_or(request.guidance_scale_2, defaults.guidance_scale_2),
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        fps=_or(request.fps, defaults.fps),
        format=request.format,
        images=images,
        priority=request.priority,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "height": (int,),
    "width": (int,),
    "num_frames": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "guidance_scale_2": (int, float),
    "seed": (int,),
    "fps": (int,),
    "format": (str,),
    "priority": (int,),
    "id": (str,),
}


OPTIONAL = {f.name for f in fields(Request) if f.default is None}


def _as_given(request: Request) -> Request:
    """Return a request whose numbers are Python's own: NumPy's are taken too, and 24.0 where 24 is meant."""
    taken = {name: _take(name, getattr(request, name), types) for name, types in TYPES.items()}
    return replace(request, **taken)


def _take(name: str, value: Any, types: tuple[type, ...]) -> Any:
    if value is None and name in OPTIONAL:
        return None
    taken = str(value) if isinstance(value, str) else real(value) if float in types else whole(value)
    if not isinstance(taken, types):
        names = " or ".join(t.__name__ for t in types)
        raise RequestError(f"{name}: {printable(repr(value), 80)} is a {type(value).__name__}; give {names}")
    if isinstance(taken, int) and taken.bit_length() > MAX_BITS:  # it could not even be printed
        raise RequestError(f"{name}: it is a number of over {MAX_BITS} bits; give a smaller one")
    return taken


def real(value: object) -> int | float | None:
    """Return a real number of any kind as Python's own; None: it is none, or a bool."""
    if isinstance(value, Real) and not isinstance(value, Integral):
        try:
            return float(value)
        except OverflowError:
            return None
    return whole(value)


def whole(value: object) -> int | None:
    """Return a whole number of any kind, 24.0 too, as Python's own; None: it is none, or a bool."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = real(value)
        return int(number) if isinstance(number, float) and number.is_integer() else None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _given_images(request: Request, config: Config) -> dict[str, Image | str | Path]:
    task = config.model.task
    wanted = IMAGES_OF[task]
    images = {}
    for name in ("image", "last_image"):
        given = getattr(request, name)
        if given is None and name in wanted:
            raise RequestError(f"{name}: none given; a model of task {task} needs one")
        if given is not None and name not in wanted:
            raise RequestError(
                f"{name}: given, but a model of task {task} takes none; leave it out or use another model"
            )
        if given is not None:
            images[name] = given
    return images


def _size(request: Request, config: Config, image: Image | None) -> tuple[int, int]:
    """Return (height, width); missing ones follow the image's aspect at the default area (Wan's own rule)."""
    height, width, area = request.height, request.width, config.defaults.height * config.defaults.width
    if image is None:
        return _or(height, config.defaults.height), _or(width, config.defaults.width)
    if height is None:
        if width is None:
            return _side(area, image.height, image.width), _side(area, image.width, image.height)
        return _floor(width * image.height // image.width), width
    return height, _or(width, _floor(height * image.width // image.height))


def _side(area: int, length: int, across: int) -> int:
    """Return one side of an area of aspect length / across, no thinner than MULTIPLE either way."""
    return min(_floor(math.isqrt(area * length // across)), _floor(area // MULTIPLE))


def _floor(pixels: int) -> int:
    return max(MULTIPLE, pixels // MULTIPLE * MULTIPLE)


def _check(request: ResolvedRequest, config: Config) -> None:
    limits = config.limits
    if not request.prompt.strip():
        raise RequestError("prompt: it is empty; say what the video shows")
    for name in ("prompt", "negative_prompt"):
        num_chars = len(getattr(request, name))
        if LONE_SURROGATE.search(getattr(request, name)):
            raise RequestError(f"{name}: it holds half of a character (a lone surrogate); give whole Unicode text")
        if num_chars > limits.max_prompt_chars:
            raise RequestError(
                f"{name}: {num_chars} characters are over limits.max_prompt_chars={limits.max_prompt_chars}; the model "
                f"reads {config.model.max_sequence_length} tokens and a longer text is refused, never cut off unseen"
            )
    for name in ("height", "width"):
        pixels = getattr(request, name)
        if pixels < MULTIPLE or pixels % MULTIPLE:
            nearest = max(MULTIPLE, round(pixels / MULTIPLE) * MULTIPLE)
            raise RequestError(f"{name}: {pixels} is not a multiple of {MULTIPLE}; the nearest is {nearest}")
    if request.height * request.width > limits.max_pixels:
        raise RequestError(
            f"height x width: {request.height}x{request.width} is over limits.max_pixels={limits.max_pixels}; "
            f"ask for a smaller size or raise the limit"
        )
    _check_numbers(request, config)
    if request.format not in FORMATS:
        raise RequestError(
            f"format: {printable(repr(request.format), 80)} is unknown; give one of {', '.join(FORMATS)}"
            f"{did_you_mean(request.format, FORMATS)}"
        )
    most, scale = MAX_SIDES.get(request.format), config.output.scale
    for name in ("height", "width"):
        if most is not None and (side := getattr(request, name) * scale) > most:
            scaled = f" (times output.scale={scale}: {side})" * (scale > 1)
            raise RequestError(
                f"{name}: {side // scale}{scaled} is over the {most} pixels that {request.format} can hold; ask for a "
                f"smaller size, or for png or npy"
            )
    if abs(request.priority) > MAX_PRIORITY:
        raise RequestError(f"priority: {request.priority} is not from {-MAX_PRIORITY} to {MAX_PRIORITY}")
    if not 1 <= len(request.id) <= 200 or not request.id.isprintable():
        raise RequestError(f"id: {printable(repr(request.id), 80)} is not 1 to 200 printable characters")


def _check_numbers(request: ResolvedRequest, config: Config) -> None:
    limits, frames, steps = config.limits, request.num_frames, request.num_inference_steps
    if frames > limits.max_frames:
        raise RequestError(f"num_frames: {frames} is over limits.max_frames={limits.max_frames}; ask for fewer")
    if frames < 1 or frames % 4 != 1:
        nearest = max(1, round((frames - 1) / 4) * 4 + 1)
        raise RequestError(f"num_frames: {frames} is not 4k + 1; the nearest is {nearest}")
    if not 1 <= steps <= limits.max_steps:
        raise RequestError(f"num_inference_steps: {steps} is not from 1 to limits.max_steps={limits.max_steps}")
    if (sigmas := config.model.sigmas) and steps != len(sigmas):
        raise RequestError(f"num_inference_steps: {steps}, but model.sigmas holds {len(sigmas)}; leave it out")
    for name in ("guidance_scale", "guidance_scale_2"):
        scale = getattr(request, name)
        if scale is not None and not 0 <= scale <= sys.float_info.max:  # an int may be larger
            raise RequestError(f"{name}: {scale} is not a finite number of 0 or more")
    if request.guidance_scale_2 is not None and config.defaults.guidance_scale_2 is None:
        raise RequestError(f"guidance_scale_2: {request.guidance_scale_2} given, but this model has one transformer")
    if not 0 <= request.seed <= MAX_SEED:
        raise RequestError(f"seed: {request.seed} is not from 0 to {MAX_SEED}")
    if not 1 <= request.fps <= 240:
        raise RequestError(f"fps: {request.fps} is not from 1 to 240")
    if request.format == "gif" and request.fps > MAX_GIF_FPS:
        raise RequestError(f"fps: {request.fps} is more than a gif can show; give {MAX_GIF_FPS} or less, or use mp4")

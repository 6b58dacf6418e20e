"""What a request gives a model beside text: images, a control video with its mask, references. Checked, then read.

Pixels travel as uint8 arrays: an image (height, width, 3), a video (num_frames, height, width, 3) and its mask
(num_frames or 1, height, width), both of the size of what is made, and all reference images in one flat array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from disagg_ray.config.rules import enforce
from disagg_ray.config.schema import Config
from disagg_ray.config.traits import aspect_rules, fit_size, reference_count_rules, reference_rules
from disagg_ray.errors import RequestError
from disagg_ray.media.clips import check_clip, read_frames, resize
from disagg_ray.media.video import (
    ImageSource,
    Picture,
    Pixels,
    blank,
    check_image_file,
    digest_pixels,
    load_image,
    to_array,
    to_image,
)
from disagg_ray.models.families import FAMILIES
from disagg_ray.text import shown

if TYPE_CHECKING:
    from disagg_ray.request import Request, ResolvedRequest

VIDEO, MASK, REFERENCES = "video", "mask", "reference_images"
IMAGES = ("image", "last_image")
FIELDS = (*IMAGES, VIDEO, MASK, REFERENCES)
"""Fields of a request that are files."""
OTHERS = (
    "conditioning_scale", "modality_scale", "audio_modality_scale", "stg_scale", "audio_stg_scale", "stg_block",
    "guidance_rescale", "audio_guidance_rescale",
)  # fmt: skip
"""Other fields that only some tasks have."""


@dataclass(frozen=True)
class GivenImage:
    """An input image: upright, RGB, not resized; or a video, of the size of what is made."""

    height: int
    width: int
    sha256: str
    """Of its pixels."""


@dataclass(frozen=True)
class Inputs:
    """What was read, and what follows from it."""

    pictures: dict[str, Picture]
    """By field."""
    about: dict[str, GivenImage]
    """By field; of several images by `field[index]`."""
    size: tuple[int, int]
    """Height and width of what is made."""
    num_frames: int


def check_inputs(request: Request, config: Config) -> bool:
    """Check inputs without opening any: of a file only that it exists and is not too large.

    Return whether one of them decides the size. Raises RequestError.
    """
    given = _given(request, config)
    for name, value in given.items():
        if name == REFERENCES:
            for number, image in enumerate(value):
                check_image_file(image, f"{name}[{number}]")
        elif name in IMAGES:
            check_image_file(value, name)
        else:
            check_clip(value, name)
    return bool(given.keys() & {VIDEO, config.model.traits.sized_by})


def read_inputs(request: Request, config: Config) -> Inputs:
    """Read a request's inputs.

    Raises:
        RequestError: names the field, the value and the remedy.
    """
    given, most = _given(request, config), config.limits.max_image_pixels
    pictures: dict[str, Picture] = {name: load_image(given[name], name, most) for name in IMAGES if name in given}
    about = {name: _about(picture) for name, picture in pictures.items()}
    images = _read_references(given.get(REFERENCES, ()), most)
    about |= {name: _about(image) for name, image in images.items()}
    for name, each in about.items():
        enforce(aspect_rules(config.model.traits, name, each.height, each.width), RequestError)
    size = _size(request, config, _sizing(config.model.traits.sized_by, about))
    num_frames = config.defaults.num_frames if request.num_frames is None else request.num_frames
    if VIDEO in given:
        pictures[VIDEO] = video = _read_video(request, config, num_frames)
        size = video.shape[1:3]
        num_frames = len(video) if request.num_frames is None else num_frames
        if MASK in given:
            pictures[MASK] = _read_mask(given[MASK], video, most)
        about |= {
            name: GivenImage(size[0], size[1], digest_pixels(pictures[name])) for name in (VIDEO, MASK) if name in given
        }
        enforce(reference_count_rules(config.model.traits, len(images), len(video)), RequestError)
    for name in images:
        enforce(reference_rules(config.model.traits, name, about[name].height, about[name].width, size), RequestError)
    if images:
        pictures[REFERENCES] = np.concatenate([to_array(image).ravel() for image in images.values()])
    return Inputs(pictures, about, size, num_frames)


def blank_inputs(config: Config) -> dict[str, Any]:
    """Return images of one grey, of the default size, for the fields of a request that a model needs."""
    grey = blank(config.defaults.width, config.defaults.height)
    return {name: [grey] if name == REFERENCES else grey for name in config.model.traits.images}


def unpack(name: str, pixels: Pixels, request: ResolvedRequest) -> Any:
    """Return an input as blocks take it, PIL images, from its pixels as they travel."""
    if name in (VIDEO, MASK):
        return [to_image(frame) for frame in pixels]
    if name != REFERENCES:
        return to_image(pixels)
    sizes = [(image.height, image.width) for image in references(request.images)]
    ends = np.cumsum([3 * height * width for height, width in sizes])
    parts = np.split(pixels, ends[:-1])
    return [to_image(part.reshape(*size, 3)) for part, size in zip(parts, sizes, strict=True)]


def references(about: Mapping[str, GivenImage]) -> list[GivenImage]:
    """Return the reference images of a request, in its order."""
    return [image for name, image in about.items() if name.startswith(f"{REFERENCES}[")]


def _about(picture: Picture) -> GivenImage:
    height, width = to_array(picture).shape[:2]
    return GivenImage(height, width, digest_pixels(picture))


def _sizing(field: str, about: Mapping[str, GivenImage]) -> tuple[int, int] | None:
    """Return (height, width) of the image that decides the size: a field's only or last one; None: there is none."""
    images = [image for name, image in about.items() if name.partition("[")[0] == field]
    return (images[-1].height, images[-1].width) if images else None


def _given(request: Request, config: Config) -> dict[str, Any]:
    """Return the fields that are given, of which the model takes each."""
    task, traits = config.model.task, config.model.traits
    given = {name: value for name in FIELDS if (value := getattr(request, name)) is not None}
    missing = [name for name in traits.images if name not in given]
    for name in (*given, *(name for name in OTHERS if getattr(request, name) is not None)):
        if name not in traits.takes:
            remedy = f"give {missing[0]}" if missing else "leave it out"
            raise RequestError(
                f"{name}: given, but a model of task {task} takes none; {remedy} or use another model{_able(name)}"
            )
        if name in traits.optional_images and not config.encodes_images:
            raise RequestError(f"{name}: given, but no stage has the block vae_encoder; leave it out, or add that")
    for name in missing:
        raise RequestError(f"{name}: none given; a model of task {task} needs one")
    if MASK in given and VIDEO not in given:
        raise RequestError(f"{MASK}: given without {VIDEO}, whose parts it chooses; give both, or neither")
    if (images := given.get(REFERENCES)) is not None:
        if not isinstance(images, list | tuple) or not 0 < len(images) <= traits.max_references:
            raise RequestError(
                f"invalid {REFERENCES}={shown(images)}: must be a list of 1 to {traits.max_references} images"
            )
        if VIDEO not in given:  # whose frames are counted when it is read
            num_frames = config.defaults.num_frames if request.num_frames is None else request.num_frames
            enforce(reference_count_rules(traits, len(images), num_frames), RequestError)
    return given


def _able(name: str) -> str:
    """Return which tasks take a field."""
    able = [f"{task} of {f.name}" for f in FAMILIES.values() for task, each in f.tasks.items() if name in each.takes]
    return f" ({', '.join(able)})"


def _read_references(given: Sequence[ImageSource], max_pixels: int) -> dict[str, Picture]:
    """Return reference images by `field[index]`."""
    names = [f"{REFERENCES}[{number}]" for number in range(len(given))]
    return {name: load_image(source, name, max_pixels) for name, source in zip(names, given, strict=True)}


def _read_video(request: Request, config: Config, num_frames: int) -> Pixels:
    """Return a control video's first frames, as many as are made, in the size of what is made."""
    source, limits, step = request.video, config.limits, config.model.traits.frames_step
    assert source is not None and step is not None
    with closing(read_frames(source, VIDEO, limits.max_image_pixels)) as frames:
        first = next(frames, None)
        if first is None:
            raise RequestError(f"{VIDEO}: {str(source)!r} holds no frames")
        height, width = _video_size(request, config, (first.height, first.width))
        enforce(limits.size_rules(height, width, num_frames, 1), RequestError)
        kept = [resize(first, height, width), *_resized(islice(frames, num_frames - 1), height, width)]
    return np.stack(kept if request.num_frames is not None else kept[: (len(kept) - 1) // step * step + 1])


def _resized(frames: Iterator[Any], height: int, width: int) -> Iterator[Pixels]:
    return (resize(frame, height, width) for frame in frames)


def _read_mask(source: Any, video: Pixels, max_pixels: int) -> Pixels:
    """Return the mask of a video's frames, or of one image for all: grey, white where the video is made anew."""
    num_frames, height, width, _ = video.shape
    with closing(read_frames(source, MASK, max_pixels)) as frames:
        mask = [resize(frame, height, width, grey=True) for frame in islice(frames, num_frames)]
    if len(mask) not in (1, num_frames):
        raise RequestError(
            f"{MASK}: {str(source)!r} holds {len(mask)} frames, for {num_frames} of the video; give as many, or one "
            f"image for all"
        )
    return np.stack(mask)


def _video_size(request: Request, config: Config, given: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of what is made of a control video, which stock fits into that size by its own rule.

    Raises:
        RequestError: stock would make other sizes of the control than of the video, whose pixels then do not meet.
    """
    multiple, sides = config.model.traits.multiple, (request.height, request.width)
    if sides == (None, None):
        size = _like(given, config.defaults.height * config.defaults.width, multiple)
    else:
        size = _size(request, config, given)
    if size is not None and _fit(given, size, multiple) == size:
        return size
    if size is None and _like(given, given[0] * given[1], multiple) is not None:
        area = f"{config.defaults.width}x{config.defaults.height}"
        raise RequestError(
            f"{VIDEO}: {shown(str(request.video))} has {given[1]}x{given[0]} pixels, and no size of its aspect, in "
            f"multiples of {multiple}, is within the default area of {area}; give height and width"
        )
    asked = "" if size is None else f", and fitted into {size[1]}x{size[0]} it is not of that size"
    raise RequestError(
        f"{VIDEO}: {shown(str(request.video))} has {given[1]}x{given[0]} pixels{asked}; give frames of the "
        f"wanted size, in multiples of {multiple}, or larger ones of the same aspect"
    )


def _like(given: tuple[int, int], area: int, multiple: int) -> tuple[int, int] | None:
    """Return the largest size of exactly the given aspect within it and the area; None: no multiple has the aspect."""
    common = math.gcd(*given)
    height, width = (side // common for side in given)
    unit = math.lcm(*(multiple // math.gcd(multiple, side) for side in (height, width)))
    height, width = height * unit, width * unit
    times = min(math.isqrt(area // (height * width)), given[0] // height)
    sizes = ((height * number, width * number) for number in range(times, 0, -1))
    return next((size for size in sizes if _fit(given, size, multiple) == size), None)


def _fit(given: tuple[int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return the (height, width) that stock makes of a video for a size. Source: its VACE pipeline."""
    height, width = given
    if height * width > size[0] * size[1]:
        scale = min(size[1] / width, size[0] / height)
        height, width = int(height * scale), int(width * scale)
    return height // multiple * multiple, width // multiple * multiple


def _size(request: Request, config: Config, image: tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width); missing ones follow the image's."""
    (height, width), default = (request.height, request.width), (config.defaults.height, config.defaults.width)
    if image is None:
        return default[0] if height is None else height, default[1] if width is None else width
    return fit_size(config.model.traits, (height, width), default, image)

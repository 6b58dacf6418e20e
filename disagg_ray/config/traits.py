"""What the family and the task of a model demand of a configuration and of a request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from disagg_ray.config.rules import Check, frames_check, side_check
from disagg_ray.models.families import FAMILIES
from disagg_ray.models.family import Task
from disagg_ray.text import did_you_mean

if TYPE_CHECKING:
    from disagg_ray.config.model import ModelConfig
    from disagg_ray.config.schema import Config
    from disagg_ray.config.stages import StageConfig

FORMATS = {"video": ("mp4", "gif", "frames", "npy"), "image": ("png", "webp", "jpg", "npy")}
"""By what a model makes; the first one is the default."""
OF_VIDEO = ("num_frames", "fps")
"""Fields that only a request for a video has."""
OF_SOUND = ("audio_guidance_scale",)
"""Fields that only a request for a video with sound has."""
LATENT_ROWS = 2
"""Rows of latents a row of tokens, in every family that decodes rows on several ranks."""


def shape_rules(
    task: Task, height: int | None, width: int | None, num_frames: int | None, num_steps: int | None = None
) -> Iterator[Check]:
    """Yield the rules of what a model can make, whatever the limits; None: not given."""
    for key, side in (("height", height), ("width", width)):
        if side is not None:
            yield side_check(key, side, task.multiple)
            yield key, side, side >= task.least_side, f"must be at least {task.least_side}"
    if num_frames is not None:
        yield frames_check("num_frames", num_frames, task.frames_step)
        yield "num_frames", num_frames, num_frames >= task.least_frames, f"must be at least {task.least_frames}"
    if num_steps is not None:
        ok, remedy = num_steps >= task.least_steps, f"must be at least {task.least_steps}"
        yield "num_inference_steps", num_steps, ok, remedy


def aspect_rules(task: Task, name: str, height: int, width: int) -> Iterator[Check]:
    """Yield that an image is not thinner than the model can see."""
    most = task.max_aspect
    ok = most is None or max(height, width) <= most * min(height, width)
    yield name, f"{width}x{height}", ok, f"must be at most {most} times as long as it is wide, or as wide; crop it"


def reference_rules(task: Task, name: str, height: int, width: int, size: tuple[int, int]) -> Iterator[Check]:
    """Yield that a reference image which is fitted into a size, (height, width), has a pixel there at least."""
    if (factor := task.fits_references_of) is not None:
        given = height // factor * factor, width // factor * factor
        scale = min(side / max(1, own) for side, own in zip(size, given, strict=True))
        ok = all(int(side * scale) >= 1 for side in given)
        remedy = f"must have {factor} pixels a side, and one of each when fitted into {size[1]}x{size[0]}; crop it"
        yield name, f"{width}x{height}", ok, remedy


def reference_count_rules(task: Task, num_images: int, num_frames: int) -> Iterator[Check]:
    """Yield a problem if there are more reference images than latent frames of the control video."""
    if task.makes == "video":
        most = task.num_latent_frames(num_frames)
        remedy = f"must be at most {most} images, one a latent frame; {num_frames} frames of control make {most}"
        yield "reference_images", num_images, num_images <= most, remedy


def fit_size(
    task: Task, asked: tuple[int | None, int | None], default: tuple[int, int], image: tuple[int, int]
) -> tuple[int, int]:
    """Return (height, width); what is not asked for follows the image's aspect, as in models' own samples.

    With neither asked for, their area is about that of the default.
    """
    (height, width), (image_height, image_width), area = asked, image, default[0] * default[1]
    if task.rounds_to is not None:
        own = nearest_sides(area, image_height, image_width, task.rounds_to)
        return (own[0] if height is None else height), (own[1] if width is None else width)
    if task.crops_to is not None and height is None and width is None:
        return crop_sides(area, image_height, image_width, task.multiple, task.crops_to)
    if height is None:
        if width is None:
            return _side(task, area, *image), _side(task, area, *image[::-1])
        return _floor(task, width * image_height // image_width), width
    return height, _floor(task, height * image_width // image_height) if width is None else width


def nearest_sides(area: int, height: int, width: int, multiple: int) -> tuple[int, int]:
    """Return (height, width) of about that area and aspect, each the nearest multiple, but one at least."""
    across = math.sqrt(area * (width / height))
    down = across / (width / height)
    return max(1, round(down / multiple)) * multiple, max(1, round(across / multiple)) * multiple


def crop_sides(area: int, height: int, width: int, multiple: int, most: int) -> tuple[int, int]:
    """Return (height, width) in multiples, within an area, of the aspect nearest to an image's, and no farther from 1.

    Neither side is more than `most` times the other. Source: diffusers' `HunyuanVideo15ImageProcessor`.
    """
    rows, columns, num = round(area / multiple**2), 1, round(area / multiple**2)
    sizes = []
    while rows:
        if max(rows, columns) <= most * min(rows, columns):
            sizes.append((round(rows / columns, 5), rows, columns))
        rows, columns = (rows, columns + 1) if rows * (columns + 1) <= num else (rows - 1, columns)
    aspect = height / width
    fits = [size for size in sizes if (size[0] <= aspect if aspect >= 1 else size[0] >= aspect)]
    _, rows, columns = min(fits, key=lambda size: abs(size[0] - aspect))
    return rows * multiple, columns * multiple


def _side(task: Task, area: int, length: int, across: int) -> int:
    """Return one side of an area of aspect length / across, no thinner than the least side either way."""
    least = max(task.multiple, task.least_side)
    return min(_floor(task, math.isqrt(area * length // across)), _floor(task, area // least))


def _floor(task: Task, pixels: int) -> int:
    return max(task.multiple, task.least_side, pixels // task.multiple * task.multiple)


def medium_rules(model: ModelConfig, fields: Mapping[str, object], format: str | None) -> Iterator[Check]:
    """Yield that a request leaves out the fields that no model of the kind has, and asks for a format that it makes.

    `fields` are those of `OF_VIDEO` and `OF_SOUND`, as they were given.
    """
    task = model.traits
    for names, has, what, ok in (
        (OF_VIDEO, lambda task: task.makes == "video", "make images; those of {} make videos", task.makes == "video"),
        (OF_SOUND, lambda task: task.sound_rate, "make no sound; those of {} do", task.sound_rate is not None),
    ):
        others = ", ".join(family.name for family in FAMILIES.values() if any(map(has, family.tasks.values())))
        remedy = f"must be left out: models of model.family={model.family} {what.format(others)}"
        for name in names:
            yield name, fields[name], ok or fields[name] is None, remedy
    known = FORMATS[task.makes]
    ok, remedy = format is None or format in known, f"must be one of {', '.join(known)}: this model makes {task.makes}s"
    yield "format", format, ok, remedy + ("" if ok else did_you_mean(str(format), known))


def sound_rules(task: Task, num_frames: int, fps: int) -> Iterator[Check]:
    """Yield that a video lasts as long as the shortest sound."""
    if task.sound_rate is not None:
        ok, most = round(num_frames / fps * task.sound_rate) >= 1, int(2 * task.sound_rate * num_frames) - 1
        yield "fps", fps, ok, f"must be at most {most}: {num_frames} frames would be over before there is any sound"


def token_rules(
    task: Task, stages: Mapping[str, StageConfig], height: int, width: int, num_frames: int
) -> Iterator[Check]:
    """Yield that the ranks of each stage can share what is made."""
    frames, rows, columns = task.num_latent_frames(num_frames), height // task.multiple, width // task.multiple
    for name, stage in stages.items():
        for group in stage.replica_groups.values():
            ok = frames * rows * columns % group.parallel.num_shards == 0
            remedy = (
                f"makes {frames} x {rows} x {columns} = {frames * rows * columns} tokens (frames, height, width), "
                f"which do not divide by the {group.parallel.num_shards} ranks that share them "
                f"(stages.{name}.parallel.ulysses x ring); choose another height, width or num_frames"
            )
            yield "height x width x num_frames", f"{height}x{width}x{num_frames}", ok, remedy
            remedy = (
                f"makes {LATENT_ROWS * rows} rows of latents, fewer than the {group.parallel.rows} ranks that share "
                f"them (stages.{name}.parallel.rows); choose another height"
            )
            yield "height", height, group.parallel.rows <= LATENT_ROWS * rows, remedy


def family_rules(config: Config) -> Iterator[Check]:
    """Yield that keys which the family's models do not have are left out."""
    family, task = FAMILIES[config.model.family], config.model.traits
    for key in family.lacks + task.without:
        section, _, rest = key.partition(".")
        others = ", ".join(name for name, other in FAMILIES.items() if key not in other.lacks)
        remedy = f"must be left out: models of model.family={family.name} do not have it; those of {others} do"
        if key in task.without:
            able = ", ".join(name for name, other in family.tasks.items() if key not in other.without)
            remedy = f"must be left out: models of model.task={config.model.task} do not have it; those of {able} do"
        for place, holder in _holders(config) if section == "stages" else [(section, getattr(config, section))]:
            value, default = attrgetter(rest)(holder), attrgetter(rest)(type(holder)())
            for name, one, usual in _leaves(f"{place}.{rest}", value, default):
                yield name, one, one == usual, remedy


def _leaves(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key of a section, or the key itself if it is none, with its value and its default."""
    if not is_dataclass(default):
        yield key, value, default
        return
    for field in fields(default):
        yield from _leaves(f"{key}.{field.name}", getattr(value, field.name), getattr(default, field.name))


def _holders(config: Config) -> Iterator[tuple[str, StageConfig]]:
    for name, stage in config.stages.items():
        for holder in (stage, *stage.replica_groups.values()):
            yield f"stages.{name}", holder

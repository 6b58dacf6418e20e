"""What the family and the task of a model demand of a configuration and of a request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from disagg_ray.config.rules import Check, frames_check, side_check
from disagg_ray.models.families import FAMILIES
from disagg_ray.models.family import Task

if TYPE_CHECKING:
    from disagg_ray.config.schema import Config
    from disagg_ray.config.stages import StageConfig

LATENTS = 2
"""Rows of latents a row of tokens, in every family that decodes rows on several ranks."""


def shape_rules(
    task: Task, height: int | None, width: int | None, num_frames: int | None, num_steps: int | None = None
) -> Iterator[Check]:
    """Yield the rules of what a model can make, whatever the limits; None: not given."""
    for key, side in (("height", height), ("width", width)):
        if side is not None:
            yield side_check(key, side, task.multiple)
    if num_frames is not None:
        yield frames_check("num_frames", num_frames, task.frames_step)
    if num_steps is not None:
        ok, remedy = num_steps >= task.least_steps, f"must be at least {task.least_steps}"
        yield "num_inference_steps", num_steps, ok, remedy


def aspect_rules(task: Task, height: int, width: int) -> Iterator[Check]:
    """Yield that an image is not thinner than the model can see."""
    most = task.max_aspect
    ok = most is None or max(height, width) <= most * min(height, width)
    yield "image", f"{width}x{height}", ok, f"must be at most {most} times as long as it is wide, or as wide; crop it"


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
    multiple = task.multiple
    if height is None:
        if width is None:
            return _side(area, *image, multiple), _side(area, *image[::-1], multiple)
        return _floor(width * image_height // image_width, multiple), width
    return height, _floor(height * image_width // image_height, multiple) if width is None else width


def nearest_sides(area: int, height: int, width: int, multiple: int) -> tuple[int, int]:
    """Return (height, width) of about that area and aspect, each the nearest multiple, but one at least."""
    across = math.sqrt(area * (width / height))
    down = across / (width / height)
    return max(1, round(down / multiple)) * multiple, max(1, round(across / multiple)) * multiple


def _side(area: int, length: int, across: int, multiple: int) -> int:
    """Return one side of an area of aspect length / across, no thinner than the multiple either way."""
    return min(_floor(math.isqrt(area * length // across), multiple), _floor(area // multiple, multiple))


def _floor(pixels: int, multiple: int) -> int:
    return max(multiple, pixels // multiple * multiple)


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
                f"makes {LATENTS * rows} rows of latents, fewer than the {group.parallel.rows} ranks that share them "
                f"(stages.{name}.parallel.rows); choose another height"
            )
            yield "height", height, group.parallel.rows <= LATENTS * rows, remedy


def family_rules(config: Config) -> Iterator[Check]:
    """Yield that keys which the family's models do not have are left out."""
    family, task = FAMILIES[config.model.family], config.model.traits
    for key in family.without + task.without:
        section, _, rest = key.partition(".")
        others = ", ".join(name for name, other in FAMILIES.items() if key not in other.without)
        remedy = f"must be left out: models of model.family={family.name} do not have it; those of {others} do"
        if key in task.without:
            able = ", ".join(name for name, other in family.tasks.items() if key not in other.without)
            remedy = f"must be left out: models of model.task={config.model.task} do not have it; those of {able} do"
        for place, holder in _holders(config) if section == "stages" else [(section, getattr(config, section))]:
            value, default = attrgetter(rest)(holder), attrgetter(rest)(type(holder)())
            yield f"{place}.{rest}", value, value == default, remedy


def _holders(config: Config) -> Iterator[tuple[str, StageConfig]]:
    for name, stage in config.stages.items():
        for holder in (stage, *stage.replica_groups.values()):
            yield f"stages.{name}", holder

"""Keys of the model: its checkpoint, kind, schedule and precision."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from disagg_ray.config.options import Dtype
from disagg_ray.config.rules import Check, Count, Positive, Rule, Section, at_most, between, one_of
from disagg_ray.models.families import DEFAULT, FAMILIES
from disagg_ray.models.family import Task
from disagg_ray.text import did_you_mean


@dataclass(frozen=True)
class DtypeConfig(Section):
    """Precision of each component's weights: float32, bfloat16 or float16."""

    text_encoder: Dtype = "bfloat16"
    """The text encoder."""
    image_encoder: Dtype = "float32"
    """The image encoder."""
    transformer: Dtype = "bfloat16"
    """The transformer, or both where a model has two."""
    vae: Dtype = "float32"
    """The VAE, encoder and decoder."""


def _falls(sigmas: list[float]) -> bool:
    return all(1 >= sigma > after >= 0 for sigma, after in pairwise([*sigmas, 0.0]))


@dataclass(frozen=True)
class ModelConfig(Section):
    """The checkpoint, and how it is sampled."""

    path: str = "???"
    """A folder in diffusers' format, a hub id (`org/name`), `builtin:NAME` for a tiny trained model of this package,
    or `random:SHAPE` for seeded random weights."""
    family: Annotated[str, one_of(*FAMILIES)] = DEFAULT
    """Kind of the model: the name of its folder in `disagg_ray/models`."""
    task: str = "t2v"
    """Input of the model: t2v (text), i2v (text and first frame), flf2v (text, first and last frame), ti2v (text, and
    a first frame if the request gives one) or vace (text, and a control video, its mask and reference images if the
    request gives them) make a video, t2i (text), edit (text and image) and edit_plus (text and reference images) make
    an image."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; required with one, so that all nodes load the same weights."""
    flow_shift: Positive | None = None
    """Shift of the flow-matching schedule; null: the checkpoint's."""
    scheduler: Annotated[str, one_of("unipc", "euler")] | None = None
    """unipc or euler, with the checkpoint's shift; null: the checkpoint's scheduler."""
    sigmas: Annotated[list[float], Rule(_falls, "must fall from at most 1 to above 0")] = field(default_factory=list)
    """Noise level of each step, falling from 1, for step-distilled checkpoints; fixes the number of steps of every
    request. They are shifted, as in diffusers, unless flow_shift is 1. []: spread over the request's steps."""
    boundary_ratio: Annotated[float, between(0, 1)] | None = None
    """Of two transformers: share of the timesteps below which the second, low-noise one takes over; null: the
    checkpoint's."""
    max_sequence_length: Annotated[Count, at_most(2**20)] = 512
    """Text tokens that the transformer attends to; shorter prompts are padded to it, longer ones are refused."""
    dtype: DtypeConfig = field(default_factory=DtypeConfig)
    """Precision of each component's weights."""

    def rules(self) -> Iterator[Check]:
        tasks = FAMILIES[self.family].tasks
        remedy = f"must be one of {', '.join(tasks)}{did_you_mean(self.task, tasks)}"
        yield "task", self.task, self.task in tasks, remedy

    @property
    def traits(self) -> Task:
        """What a request may ask of the model."""
        return FAMILIES[self.family].tasks[self.task]

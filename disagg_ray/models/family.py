"""What a family of models is, as data. Nothing outside `models` knows a family by name: it asks these.

A family is a folder beside this file, whose `__init__` holds `FAMILY`. What takes longer to import is in modules of
that folder, which `Family.part` imports when they are needed:

- `shapes`: SHAPES, the models that can be made of random weights, by name
- `random`: `build_meta` and `build_others`, which make a shape's components
- `text`, or what a task names: `prepare`, what its tokenizer gets of a prompt, NUM_DROPPED, tokens of that which the
  model never sees, and, if there are any, RESERVED texts that no prompt may hold, and `check`, which refuses a prompt
  for more than those and its length
- `geometry`: `tasks_of` an index, and `read_geometry` of configurations: how large tensors between stages are
- `model`: MODEL, which runs it (`models.model.Model`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

OF_TWO = ("model.boundary_ratio", "defaults.guidance_scale_2")
"""Keys of a configuration that only models with two transformers have."""
OF_SOUND = ("defaults.audio_guidance_scale",)
"""Those that only models of video with sound have."""


@dataclass(frozen=True)
class Component:
    """What a family expects of one component of a model folder."""

    library: Literal["diffusers", "transformers"]
    classes: tuple[str, ...]
    """Names that the index may give; empty: any scheduler."""
    config: str = "config.json"
    """File of its configuration."""
    values: type | None = None
    """Types of the configuration's values, where the class itself does not check them."""
    loader: str | None = None
    """Class that loads the part of it that is used, where that is not the one that indexes name."""
    module: str | None = None
    """Module of diffusers' pipelines that has the class, by which indexes name its library; None: diffusers itself."""
    dtype_of: str | None = None
    """Component whose key in `model.dtype` it has; None: its own."""

    @property
    def weights(self) -> str | None:
        """Name of its weights, without suffix; None: it has none."""
        if self.config != "config.json":
            return None
        return "diffusion_pytorch_model" if self.library == "diffusers" else "model"


def tokenizer(name: str) -> Component:
    """Return a tokenizer, of whichever class an index names for it."""
    classes = (name, f"{name}Fast", "PreTrainedTokenizerFast", "TokenizersBackend")
    return Component("transformers", classes, "tokenizer_config.json")


def euler_scheduler(values: type) -> Component:
    """Return the scheduler of Euler steps of flow matching, whose configuration is of `values`."""
    return Component("diffusers", ("FlowMatchEulerDiscreteScheduler",), "scheduler_config.json", values)


@dataclass(frozen=True)
class Task:
    """What a request may ask of a model of one task."""

    images: tuple[str, ...] = ()
    """Fields of images that it needs."""
    optional_images: tuple[str, ...] = ()
    """Those that it takes and does not need, videos too."""
    others: tuple[str, ...] = ()
    """Other fields that not every task takes."""
    max_references: int = 0
    """Most images in `reference_images`."""
    fits_references_of: int | None = None
    """What a reference's sides are cut down to multiples of before it is fitted into the video; None: it is not."""
    sized_by: str = "image"
    """The field whose image, of several the last one, sides that are left out follow."""
    multiple: int = 16
    """What height and width are multiples of: pixels of one token."""
    rounds_to: int | None = None
    """What sides that follow from an image are rounded to; None: they are cut down to `multiple`, and a side that is
    given decides the other."""
    crops_to: int | None = None
    """Where no side is given, an image is cropped to the nearest of the sizes of the default area, whose one side is at
    most this many times the other (`traits.crop_sides`); None: it is not."""
    max_aspect: int | None = None
    """The most that one side of an image is of the other; None: whatever it is."""
    text: str = "text"
    """The module of the family's folder that prepares its prompts."""
    least_side: int = 1
    """Pixels of height and of width at least."""
    frames_step: int | None = 4
    """Frames are a multiple of it and one more: a latent frame makes as many, the first one alone makes one. None: what
    is made is one image."""
    least_frames: int = 1
    """Frames of a video at least."""
    least_steps: int = 1
    """Denoising steps with which its schedule is a number."""
    step_caches: tuple[str, ...] = ("first_block", "mag", "taylorseer")
    """Methods of `denoiser.step_cache` that its transformers have."""
    sound_rate: float | None = None
    """Latents of sound a second, of which a video has at least one; None: its videos have no sound."""

    without: tuple[str, ...] = ()
    """Keys of a configuration that its models do not have, beside those of the family."""

    @property
    def takes(self) -> tuple[str, ...]:
        """Fields of a request that not every task takes, and this one does."""
        return self.images + self.optional_images + self.others

    @property
    def makes(self) -> Literal["video", "image"]:
        return "video" if self.frames_step is not None else "image"

    def num_latent_frames(self, num_frames: int) -> int:
        return 1 if self.frames_step is None else (num_frames - 1) // self.frames_step + 1


@dataclass(frozen=True)
class Family:
    """One kind of model. Its tasks, components and stock pipelines."""

    name: str
    """Of its folder, and the value of `model.family`."""
    title: str
    """In messages."""
    tasks: Mapping[str, Task]
    """By the value of `model.task`."""
    pipelines: tuple[str, ...]
    """Classes of the stock diffusers pipelines that it equals, as indexes name them."""
    components: Mapping[str, Component]
    """By name, which is that of their folder."""
    shifts_by_size: bool = False
    """Whether its scheduler's shift follows from the size of what is made (`use_dynamic_shifting`)."""
    without: tuple[str, ...] = ()
    """Keys of a configuration that its models do not have, beside `OF_TWO` and `OF_SOUND`; those of any stage begin
    with `stages`."""

    @property
    def lacks(self) -> tuple[str, ...]:
        """All keys of a configuration that its models do not have."""
        of_two = () if "transformer_2" in self.components else OF_TWO
        of_sound = () if any(task.sound_rate for task in self.tasks.values()) else OF_SOUND
        return self.without + of_two + of_sound

    def part(self, name: str) -> Any:
        """Import a module of the family's folder."""
        return import_module(f"{__package__}.{self.name}.{name}")

"""Components of other stages: their configurations, for the blocks here that compute with them.

Diffusers' blocks take constants, and say nothing, where a component is absent: a VAE that spans 8 pixels and 4 frames,
16 channels of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers.configuration_utils import FrozenDict

from disagg_ray.errors import CheckpointError
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.family import Component
from disagg_ray.models.load import find_class


class Absent:
    """A component's configuration in its place, without weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = FrozenDict(config)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["config"][name]
        except KeyError:
            raise AttributeError(name) from None


def stand_in(pipeline: Any, checkpoint: Checkpoint, constants: Mapping[str, int]) -> None:
    """Put configurations in the place of a pipeline's models, until they are loaded here, if they are.

    `constants` are what the pipeline must then compute, by its property.

    Raises:
        CheckpointError: diffusers' blocks would compute with other numbers than this checkpoint has.
    """
    for name, class_name in checkpoint.components.items():
        kind = checkpoint.family.components[name]
        if kind.library == "diffusers" and kind.weights is not None:
            setattr(pipeline, name, Absent(_defaults(kind, class_name) | checkpoint.read_config(name)))
    for name, expected in constants.items():
        if (found := getattr(pipeline, name)) != expected:
            raise CheckpointError(
                f"model.path: diffusers takes {name} of {checkpoint.model.path!r} for {found}, and its configurations "
                f"say {expected}: blocks for such a model are not known here"
            )


def _defaults(kind: Component, class_name: str) -> dict[str, Any]:
    parameters = signature(find_class(kind, class_name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}

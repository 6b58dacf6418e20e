"""What can be known before Ray starts: whether the model fits the configuration, and this machine Ray."""

from __future__ import annotations

import os

from disagg_ray import environment
from disagg_ray.config.schema import Config
from disagg_ray.errors import CheckpointError, ConfigError
from disagg_ray.models.checkpoint import RANDOM, check_here, find_here, open_checkpoint
from disagg_ray.models.families import find_shape
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.lora_files import check_loras
from disagg_ray.text import shown

SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray puts behind the temporary folder."""
MOST_SOCKET_BYTES = 107
"""Linux's limit of a socket's path."""


def check_temporary_folder() -> None:
    """Check that Ray's sockets can lie in the temporary folder.

    Raises:
        ConfigError: names the variable that is to be set.
    """
    name, folder = environment.ray_temporary_folder()
    if len(os.fsencode(folder + SOCKET)) > MOST_SOCKET_BYTES:
        most = MOST_SOCKET_BYTES - len(SOCKET)
        raise ConfigError(
            f"invalid {name}={shown(folder)}: must be at most {most} characters: Ray puts sockets there; "
            f"export RAY_TMPDIR=/tmp"
        )


def check_model(config: Config, *, whole: bool) -> None:
    """Check what this machine has of the model and of LoRA files, and that it fits the configuration.

    `whole`: the stages run here and nowhere else, so what is missing here is a fault.

    Raises:
        CheckpointError: the model or a LoRA is missing, unsafe or not what the configuration says.
        ConfigError: names the key that does not fit it.
    """
    model = config.model
    check_loras(config, whole=whole)
    if model.path.startswith(RANDOM):  # made where it is wanted, which costs imports of all models
        try:
            find_shape(model.path.removeprefix(RANDOM))
        except ValueError as error:
            raise CheckpointError(f"model.path: {model.path!r} cannot be made: {error}") from error
        return
    check_here(model, whole=whole)
    if whole or find_here(model) is not None:
        check_fit(config, open_checkpoint(model).geometry)


def check_fit(config: Config, geometry: Geometry) -> None:
    """Check the keys that a model with one or with two transformers needs.

    Raises:
        ConfigError: names the key.
    """
    scale, ratio, path = config.defaults.guidance_scale_2, geometry.boundary_ratio, config.model.path
    if geometry.two_transformers and scale is None:
        raise ConfigError(f"defaults.guidance_scale_2: null, but {path!r} has two transformers; give one")
    if not geometry.two_transformers and scale is not None:
        raise ConfigError(f"defaults.guidance_scale_2: {scale}, but {path!r} has one transformer; write null")
    if geometry.two_transformers and not (isinstance(ratio, (int, float)) and 0 <= ratio <= 1):
        raise ConfigError(
            f"model.boundary_ratio: null, and {path!r} has two transformers and says {shown(ratio)}; give the share of "
            f"the timesteps from which the second takes over, as 0.875 for text and 0.9 for images"
        )
    if not geometry.two_transformers and config.model.boundary_ratio is not None:
        raise ConfigError(
            f"model.boundary_ratio: {config.model.boundary_ratio}, but {path!r} has one transformer; write null"
        )

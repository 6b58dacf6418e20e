"""Which tasks a Qwen-Image checkpoint serves, and how large the tensors between its stages are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from disagg_ray.config.schema import ModelConfig
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import read_config
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.qwen_image import FAMILY

MOST_TOKENS = 1024
"""Of a prompt, as the stock pipeline has it."""


def tasks_of(_: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tasks that a checkpoint serves."""
    return ("t2i",)


def read_geometry(model: ModelConfig, folder: Path, _: Mapping[str, Any], __: Iterable[str]) -> Geometry:
    """Read the configurations of a checkpoint.

    Raises:
        CheckpointError: one is malformed, or is of a model that is not known here.
        KeyError: one lacks a number.
    """
    transformer, vae = (read_config(FAMILY.components[name], folder, name) for name in ("transformer", "vae"))
    tokens = 4 * vae["z_dim"]
    for wrong, what in (
        (transformer.get("guidance_embeds", False), "guidance_embeds, the scale of guidance as an input"),
        (transformer.get("use_additional_t_cond", False), "use_additional_t_cond, of models of layers"),
        (transformer.get("use_layer3d_rope", False), "use_layer3d_rope, of models of layers"),
        (transformer.get("patch_size", 2) != 2, "a patch_size other than 2"),
        (transformer.get("in_channels", 64) != tokens, f"in_channels other than the {tokens} of 2 x 2 latents"),
    ):
        if wrong:
            raise CheckpointError(f"model.path: the transformer of {model.path!r} has {what}, which is not supported")
    if model.max_sequence_length > MOST_TOKENS:
        raise CheckpointError(
            f"model.max_sequence_length: {model.max_sequence_length} is over the {MOST_TOKENS} tokens that "
            f"{FAMILY.title} was made for; write at most that"
        )
    downsample = vae.get("temperal_downsample", [False, True, True])  # diffusers' spelling
    return Geometry(
        text_dim=transformer["joint_attention_dim"],
        max_sequence_length=model.max_sequence_length,
        latent_channels=vae["z_dim"],
        spatial_factor=2 ** len(downsample),
        temporal_factor=2 ** sum(downsample),
    )

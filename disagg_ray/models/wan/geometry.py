"""Which tasks a Wan checkpoint serves, and how large the tensors between its stages are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config.model import ModelConfig
from disagg_ray.config.options import tile_tensors
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import read_config
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.wan import FAMILY

logger = logging.getLogger("disagg_ray")

IMAGE_TEXT_TOKENS = 512
"""What diffusers' `WanAttnProcessor` splits image tokens from text tokens at, whatever the text's length is."""


@dataclass(frozen=True)
class WanGeometry(Geometry):
    """The numbers of a Wan checkpoint that decide the sizes of tensors between stages."""

    image_tokens: int
    """Tokens of the embedding of one image; 0 without an image encoder."""
    image_dim: int
    num_images: int = 1
    """Images whose embeddings the transformer takes together."""
    expand_timesteps: bool = False
    """Whether each token has a timestep of its own (TI2V)."""
    max_references: int = 0
    """Reference images that a control may have (VACE)."""

    def tensor_shapes(self, height: int, width: int, num_frames: int) -> dict[str, tuple[int, ...]]:
        latents = self.latents_shape(height, width, num_frames)
        one, channels, times, *sides = latents
        return super().tensor_shapes(height, width, num_frames) | {
            "image_embeds": (self.num_images, self.image_tokens, self.image_dim),
            "image_latents": (one, channels, 1, *sides),
            "image_condition_latents": (one, channels + self.temporal_factor, times, *sides),
            "first_frame_latents": latents,
            "first_last_frame_latents": latents,
            "control_hidden_states": (one, self._control_channels, times, *sides),
        }

    @property
    def _control_channels(self) -> int:
        """Channels of a control: latents of what stays and of what is made, and the mask of each pixel."""
        return 2 * self.latent_channels + self.spatial_factor**2

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        latents = self._num_latents(pixels, num_frames)
        references = self.max_references * self._num_latents(pixels, 1)
        return super().tensor_bytes(pixels, num_frames, image_pixels) | {
            "image_embeds": 2 * 4 * self.image_tokens * self.image_dim,
            "image_latents": 4 * self.latent_channels * self._num_latents(pixels, 1),
            "image_condition_latents": 4 * (self.latent_channels + self.temporal_factor) * latents,
            "first_frame_latents": 4 * self.latent_channels * latents,
            "first_last_frame_latents": 4 * self.latent_channels * latents,
            "video": 3 * pixels * num_frames,
            "mask": pixels * num_frames,
            "reference_images": 3 * image_pixels * self.max_references,
            "control_hidden_states": 4 * self._control_channels * (latents + references),
            **{name: 4 * 3 * num_frames * _part_pixels(pixels, num_parts) for name in tile_tensors(num_parts)},
        }


def _part_pixels(pixels: int, num_parts: int) -> int:
    """Return an upper bound of the pixels of one part's tiles.

    Tiles of 256 x 256 begin every 192 pixels: together they are at most 4/3 as high and as wide as the video. Each is
    dealt to the part with the least, which therefore gets at most its share and one tile more.
    """
    return -(-16 * pixels // (9 * num_parts)) + min(pixels, 256 * 256)


def tasks_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tasks that a checkpoint serves, by its index."""
    if index.get("expand_timesteps"):
        return ("ti2v",)
    if index["_class_name"] == "WanVACEPipeline":
        return ("vace",)
    return ("t2v",) if index["_class_name"] == "WanPipeline" else ("i2v", "flf2v")


def read_geometry(model: ModelConfig, folder: Path, index: dict[str, Any], components: Iterable[str]) -> WanGeometry:
    """Read the configurations of a checkpoint.

    Raises:
        CheckpointError: one is malformed, or they are not those of the task.
        KeyError: one lacks a number.
    """
    transformer, vae = (read_config(FAMILY.components[name], folder, name) for name in ("transformer", "vae"))
    wants_image = transformer.get("image_dim") is not None
    image_tokens = image_dim = 0
    if "image_encoder" in components and wants_image:
        image = read_config(FAMILY.components["image_encoder"], folder, "image_encoder")
        image_tokens = (image["image_size"] // image["patch_size"]) ** 2 + 1
        image_dim = image["hidden_size"]
    _check_task(model, transformer)
    if index.get("expand_timesteps"):
        _check_ti2v(model, transformer, vae, components)
    if model.task == "vace":
        _check_vace(model, transformer, vae, components)
    downsample = vae.get("temperal_downsample", [False, True, True])  # diffusers' spelling
    return WanGeometry(
        text_dim=transformer["text_dim"],
        max_sequence_length=model.max_sequence_length,
        latent_channels=vae["z_dim"],
        spatial_factor=2 ** len(downsample) * (vae.get("patch_size") or 1),
        temporal_factor=2 ** sum(downsample),
        image_tokens=image_tokens,
        image_dim=image_dim,
        num_images=2 if model.task == "flf2v" else 1,
        two_transformers="transformer_2" in components,
        boundary_ratio=model.boundary_ratio if model.boundary_ratio is not None else index.get("boundary_ratio"),
        expand_timesteps=bool(index.get("expand_timesteps")),
        max_references=model.traits.max_references,
    )


def _check_task(model: ModelConfig, transformer: Mapping[str, Any]) -> None:
    """Refuse a last frame for a transformer that knows none, and the reverse; warn of a length that it does not split.

    Raises:
        CheckpointError: names the right task.
    """
    if transformer.get("added_kv_proj_dim") is not None and model.max_sequence_length != IMAGE_TEXT_TOKENS:
        logger.warning(
            "model.max_sequence_length: %d is not what %r expects: its attention takes the last %d tokens for text and "
            "those before for the image, as the stock pipeline does", model.max_sequence_length, model.path,
            IMAGE_TEXT_TOKENS,
        )  # fmt: skip
    first_and_last = transformer.get("pos_embed_seq_len") is not None
    wants_image = transformer.get("image_dim") is not None
    if model.task != "t2v" and wants_image and first_and_last != (model.task == "flf2v"):
        right = "flf2v" if first_and_last else "i2v"
        raise CheckpointError(f"model.task: {model.task!r} does not fit {model.path!r}; write {right}")


def _check_ti2v(
    model: ModelConfig, transformer: Mapping[str, Any], vae: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Refuse a model with a timestep a token that is otherwise than TI2V-5B.

    Raises:
        CheckpointError: names what is otherwise.
    """
    pixels = vae.get("scale_factor_spatial", 8) * transformer.get("patch_size", [1, 2, 2])[1]
    for wrong, what in (
        ("transformer_2" in names, "two transformers"),
        (transformer.get("image_dim") is not None, "a transformer that wants an image encoder"),
        (transformer.get("in_channels") != vae["z_dim"], "a transformer of other channels than the VAE's latents"),
        (pixels != model.traits.multiple, f"sizes in multiples of {pixels}, not {model.traits.multiple}"),
    ):
        if wrong:
            raise CheckpointError(f"model.path: {model.path!r} has expand_timesteps and {what}, which is not supported")


def _check_vace(
    model: ModelConfig, transformer: Mapping[str, Any], vae: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Refuse a VACE model that is otherwise than Wan 2.1's.

    Raises:
        CheckpointError: names what is otherwise.
    """
    channels = 2 * vae["z_dim"] + vae.get("scale_factor_spatial", 8) ** 2
    for wrong, what in (
        ("transformer_2" in names, "two transformers (VACE-Fun)"),
        (transformer.get("image_dim") is not None, "a transformer that wants an image encoder"),
        (transformer.get("vace_in_channels") != channels, f"a control of other channels than {channels}"),
        (bool(vae.get("patch_size")), "a VAE of patches"),
    ):
        if wrong:
            raise CheckpointError(f"model.path: {model.path!r} is a VACE model with {what}, which is not supported")

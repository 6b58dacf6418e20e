"""How large the tensors between the stages of a HunyuanVideo 1.5 checkpoint are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config.model import ModelConfig
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import read_config
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.hunyuan_video15 import FAMILY
from disagg_ray.models.hunyuan_video15.text import MOST_QUOTED, MOST_TOKENS

TEXTS = ("prompt", "negative_prompt")
PARTS = ("embeds", "embeds_mask", "embeds_2", "embeds_mask_2")
"""Of each text, `prompt_embeds` and so on: embeddings (1, tokens, width) of it and of what it quotes, and which tokens
count, int64 (1, tokens)."""


@dataclass(frozen=True)
class HunyuanVideo15Geometry(Geometry):
    """The numbers of a checkpoint that decide the sizes of tensors between stages."""

    quoted_dim: int
    """Width of an embedding of quoted texts."""
    image_tokens: int
    """Tokens of the embedding of an image; 0 of a model that takes none."""
    image_dim: int
    """Width of each."""

    def tensor_shapes(self, height: int, width: int, num_frames: int) -> dict[str, tuple[int, ...]]:
        own, quoted = (1, self.max_sequence_length), (1, MOST_QUOTED)
        shapes = dict(zip(PARTS, ((*own, self.text_dim), own, (*quoted, self.quoted_dim), quoted), strict=True))
        return {f"{text}_{part}": shape for text in TEXTS for part, shape in shapes.items()} | {
            "image_embeds": (1, self.image_tokens, self.image_dim),
            "image_latents": self.latents_shape(height, width, 1),
            "latents": self.latents_shape(height, width, num_frames),
        }

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        own, quoted = self.max_sequence_length, MOST_QUOTED
        sizes = zip(PARTS, (4 * own * self.text_dim, 8 * own, 4 * quoted * self.quoted_dim, 8 * quoted), strict=True)
        return {f"{text}_{part}": size for part, size in sizes for text in TEXTS} | {
            "image": 3 * image_pixels,
            "image_embeds": 4 * self.image_tokens * self.image_dim,
            "image_latents": 4 * self.latent_channels * self._num_latents(pixels, 1),
            "latents": 4 * self.latent_channels * self._num_latents(pixels, num_frames),
        }


def tasks_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tasks that a checkpoint serves, by its index."""
    return ("i2v",) if index["_class_name"] == "HunyuanVideo15ImageToVideoPipeline" else ("t2v",)


def read_geometry(
    model: ModelConfig, folder: Path, _: Mapping[str, Any], components: Iterable[str]
) -> HunyuanVideo15Geometry:
    """Read the configurations of a checkpoint.

    Raises:
        CheckpointError: one is malformed, they do not fit each other, or are of a model that is not known here.
        KeyError: one lacks a number.
    """
    read = {name: read_config(FAMILY.components[name], folder, name) for name in ("transformer", "vae")}
    encoders = [read_config(FAMILY.components[name], folder, name) for name in ("text_encoder", "text_encoder_2")]
    image_tokens, image_dim = _read_image_encoder(model, folder) if model.traits.images else (0, 0)
    geometry = HunyuanVideo15Geometry(
        text_dim=encoders[0]["hidden_size"],
        max_sequence_length=model.max_sequence_length,
        latent_channels=read["vae"]["latent_channels"],
        spatial_factor=read["vae"]["spatial_compression_ratio"],
        temporal_factor=read["vae"]["temporal_compression_ratio"],
        quoted_dim=encoders[1]["d_model"],
        image_tokens=image_tokens,
        image_dim=image_dim,
    )
    _check_fit(model, geometry, read["transformer"])
    if "guider" in components:
        _check_guider(model, read_config(FAMILY.components["guider"], folder, "guider"))
    if model.max_sequence_length > MOST_TOKENS:
        raise CheckpointError(
            f"model.max_sequence_length: {model.max_sequence_length} is over the {MOST_TOKENS} tokens that "
            f"{FAMILY.title} was made for; write at most that"
        )
    return geometry


def _read_image_encoder(model: ModelConfig, folder: Path) -> tuple[int, int]:
    """Return how many tokens it makes of an image, and their width; refuse images of other sizes than it sees."""
    names = ("image_encoder", "feature_extractor")
    encoder, given = (read_config(FAMILY.components[name], folder, name) for name in names)
    side = encoder["image_size"]
    if given.get("size") != {"height": side, "width": side} or given.get("do_center_crop") or given.get("do_pad"):
        raise CheckpointError(
            f"model.path: the feature_extractor of {model.path!r} makes images of another size than the {side} x "
            f"{side} pixels that its image_encoder sees; write those, and neither do_center_crop nor do_pad"
        )
    return (side // encoder["patch_size"]) ** 2, encoder["hidden_size"]


def _check_fit(model: ModelConfig, geometry: HunyuanVideo15Geometry, transformer: Mapping[str, Any]) -> None:
    """Refuse components whose numbers contradict each other: each stage computes with its own."""
    for name, found, wanted in (
        ("transformer.in_channels", transformer["in_channels"], 2 * geometry.latent_channels + 1),
        ("transformer.out_channels", transformer["out_channels"], geometry.latent_channels),
        ("transformer.text_embed_dim", transformer["text_embed_dim"], geometry.text_dim),
        ("transformer.text_embed_2_dim", transformer["text_embed_2_dim"], geometry.quoted_dim),
        ("transformer.image_embed_dim", seen := transformer["image_embed_dim"], geometry.image_dim or seen),
        ("vae.spatial_compression_ratio", geometry.spatial_factor, model.traits.multiple),
        ("vae.temporal_compression_ratio", geometry.temporal_factor, model.traits.frames_step),
    ):
        if found != wanted:
            raise CheckpointError(
                f"model.path: {name} of {model.path!r} is {found}, and its other configurations say {wanted}"
            )
    if transformer.get("patch_size", 1) != 1 or transformer.get("patch_size_t", 1) != 1:
        raise CheckpointError(f"model.path: {model.path!r} has a patch_size other than 1, which is not supported")


def _check_guider(model: ModelConfig, guider: Mapping[str, Any]) -> None:
    """Refuse guidance that is more than a scale, which is the request's."""
    for key, wanted in (("guidance_rescale", 0), ("use_original_formulation", False), ("start", 0), ("stop", 1)):
        if guider.get(key, wanted) != wanted:
            raise CheckpointError(
                f"model.path: the guider of {model.path!r} has {key}={guider[key]}, which is not supported; write "
                f"{wanted} there"
            )

"""Which tasks a Qwen-Image checkpoint serves, and how large the tensors between its stages are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config.model import ModelConfig
from disagg_ray.config.traits import nearest_sides
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import read_config
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.qwen_image import FAMILY

MOST_TOKENS = 1024
"""Of a prompt, as the stock pipeline has it."""


SEEN_PIXELS, SEEN_STEP = 1024 * 1024, 32
"""About as large an image is made before its latents are, and what sides that it is seen at are multiples of.

Source: stock."""
LEAST, MOST = 56 * 56, 28 * 28 * 1280
"""Pixels that the text encoder sees of an image, where its processor does not say. Source: transformers."""


PATCHES = (
    ("patch_size", "patch_size", 14),
    ("merge_size", "spatial_merge_size", 2),
    ("temporal_patch_size", "temporal_patch_size", 2),
)
"""Keys of the processor and of the text encoder that must agree, and what both are where neither says."""


@dataclass(frozen=True)
class EditGeometry(Geometry):
    """The numbers of a checkpoint that edits images."""

    image_tokens: int
    """Maximum number of tokens per image in the text encoder, its label included."""
    num_images: int
    """The most images of a request."""

    def tensor_shapes(self, height: int, width: int, num_frames: int) -> dict[str, tuple[int, ...]]:
        """Return shapes as of a request with one image, of the size of what is made."""
        rows, columns = (side // self.spatial_factor // 2 for side in seen_sides(height, width))
        return super().tensor_shapes(height, width, num_frames) | {
            "prompt_embeds": (1, self.max_sequence_length + self.image_tokens, self.text_dim),
            "packed_image_latents": (1, rows * columns, 4 * self.latent_channels),
        }

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        prompt = 4 * (self.max_sequence_length + self.num_images * self.image_tokens) * self.text_dim
        latents = 4 * self.latent_channels * self._num_latents(_most(SEEN_PIXELS, SEEN_STEP), 1)
        return super().tensor_bytes(pixels, num_frames, image_pixels, num_parts) | {
            "prompt_embeds": prompt,
            "negative_prompt_embeds": prompt,
            "packed_image_latents": self.num_images * latents,
            "reference_images": 3 * image_pixels * self.num_images,
        }


def seen_sides(height: int, width: int, pixels: int = SEEN_PIXELS) -> tuple[int, int]:
    """Return the (height, width) at which the model sees an image: about as many pixels, of its aspect."""
    return nearest_sides(pixels, height, width, SEEN_STEP)


def _most(pixels: int, multiple: int) -> int:
    """Return an upper bound of an image's pixels after both sides were rounded to a multiple."""
    aspect = FAMILY.tasks["edit"].max_aspect or 1
    return math.ceil(pixels + multiple * (1 + math.sqrt(aspect)) * math.sqrt(pixels) + multiple**2)


def tasks_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tasks that a checkpoint serves, by its index."""
    edits = {"QwenImageEditPipeline": "edit", "QwenImageEditPlusPipeline": "edit_plus"}
    return (edits.get(index["_class_name"], "t2i"),)


def count_image_tokens(model: ModelConfig, folder: Path) -> int:
    """Return the maximum number of tokens per image in the text encoder, its label included.

    The processor's configuration says into how many patches an image is cut.

    Raises:
        CheckpointError: the processor makes patches that the text encoder does not take, or of absurd numbers.
    """
    text = FAMILY.part(model.traits.text)
    given = read_config(FAMILY.components["processor"], folder, "processor")
    encoder = read_config(FAMILY.components["text_encoder"], folder, "text_encoder")
    vision, sizes = (
        each if isinstance(each, dict) else {} for each in (encoder.get("vision_config"), given.get("size"))
    )
    least = given.get("min_pixels") or sizes.get("shortest_edge") or LEAST
    most = given.get("max_pixels") or sizes.get("longest_edge") or MOST
    for key, of_vision, default in PATCHES:
        if given.get(key, default) != (expected := vision.get(of_vision, default)):
            raise CheckpointError(
                f"model.path: the processor of {model.path!r} has {key}={given.get(key)}, and its text encoder wants "
                f"{expected}"
            )
    unit = int(given.get("patch_size", 14) * given.get("merge_size", 2))
    if type(least) is not int or type(most) is not int or not unit**2 <= least <= min(most, text.PIXELS):
        raise CheckpointError(
            f"model.path: the processor of {model.path!r} makes images of {least} to {most} pixels, and must of "
            f"{unit**2} to {text.PIXELS} at the least, and of no less at the most"
        )
    seen = _most(min(most, _most(text.PIXELS, SEEN_STEP)), unit) // unit**2
    return seen + len(text.PICTURE)  # no token of a text is shorter than a byte


def read_geometry(model: ModelConfig, folder: Path, _: Mapping[str, Any], __: Iterable[str]) -> Geometry:
    """Read the configurations of a checkpoint.

    Raises:
        CheckpointError: one is malformed, or is of a model that is not known here.
        KeyError: one lacks a number.
    """
    transformer, vae = (read_config(FAMILY.components[name], folder, name) for name in ("transformer", "vae"))
    tokens, multiple = 4 * vae["z_dim"], model.traits.multiple
    downsample = vae.get("temperal_downsample", [False, True, True])  # diffusers' spelling
    for wrong, what in (
        (transformer.get("guidance_embeds", False), "guidance_embeds, the scale of guidance as an input"),
        (transformer.get("use_additional_t_cond", False), "use_additional_t_cond, of models of layers"),
        (transformer.get("use_layer3d_rope", False), "use_layer3d_rope, of models of layers"),
        (transformer.get("patch_size", 2) != 2, "a patch_size other than 2"),
        (2 * 2 ** len(downsample) != multiple, f"a VAE of {2 ** len(downsample)} pixels a latent, not {multiple // 2}"),
        (transformer.get("in_channels", 64) != tokens, f"in_channels other than the {tokens} of 2 x 2 latents"),
    ):
        if wrong:
            raise CheckpointError(f"model.path: the transformer of {model.path!r} has {what}, which is not supported")
    if model.max_sequence_length > MOST_TOKENS:
        raise CheckpointError(
            f"model.max_sequence_length: {model.max_sequence_length} is over the {MOST_TOKENS} tokens that "
            f"{FAMILY.title} was made for; write at most that"
        )
    numbers = {
        "text_dim": transformer["joint_attention_dim"],
        "max_sequence_length": model.max_sequence_length,
        "latent_channels": vae["z_dim"],
        "spatial_factor": 2 ** len(downsample),
        "temporal_factor": 2 ** sum(downsample),
    }
    if model.traits.images:
        most = max(1, model.traits.max_references)
        return EditGeometry(**numbers, image_tokens=count_image_tokens(model, folder), num_images=most)
    return Geometry(**numbers)

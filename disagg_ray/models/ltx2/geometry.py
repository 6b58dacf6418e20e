"""How large the tensors between the stages of an LTX-2 checkpoint are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config.model import ModelConfig
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import read_config
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.ltx2 import FAMILY

AUDIO_FACTOR = 4
"""Frames and bins of a spectrogram that a latent spans; a constant of diffusers' class."""
EXAMPLE_FPS = 24


@dataclass(frozen=True)
class LTX2Geometry(Geometry):
    """The numbers of an LTX-2 checkpoint that decide the sizes of tensors between stages."""

    audio_text_dim: int
    """Width of a text embedding for sound."""
    audio_channels: int
    """Channels of a latent of sound."""
    audio_bins: int
    """Bins of a latent of sound."""
    audio_rate: float
    """Latents of sound a second."""

    def num_audio_latents(self, num_frames: int, fps: float) -> int:
        """Return how many latents of sound go with a video, as the stock pipeline counts them."""
        return round(num_frames / float(fps) * self.audio_rate)

    def tensor_shapes(self, height: int, width: int, num_frames: int) -> dict[str, tuple[int, ...]]:
        latents = self.latents_shape(height, width, num_frames)
        one, channels, _, *sides = latents
        return {
            "connector_prompt_embeds": (1, self.max_sequence_length, self.text_dim),
            "connector_audio_prompt_embeds": (1, self.max_sequence_length, self.audio_text_dim),
            "connector_attention_mask": (1, self.max_sequence_length),
            "image_latents": (one, channels, 1, *sides),
            "latents": latents,
            "audio_latents": (
                1, self.num_audio_latents(num_frames, EXAMPLE_FPS), self.audio_channels * self.audio_bins,
            ),
        }  # fmt: skip

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        tokens, sound = 2 * self.max_sequence_length, self.num_audio_latents(num_frames, 1)
        return {
            "connector_prompt_embeds": 4 * tokens * self.text_dim,
            "connector_audio_prompt_embeds": 4 * tokens * self.audio_text_dim,
            "connector_attention_mask": 8 * tokens,
            "image_latents": 4 * self.latent_channels * self._num_latents(pixels, 1),
            "latents": 4 * self.latent_channels * self._num_latents(pixels, num_frames),
            "audio_latents": 4 * self.audio_channels * self.audio_bins * sound,
            "image": 3 * image_pixels,
        }


def tasks_of(_: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tasks that a checkpoint serves."""
    return ("ti2v",)


def read_geometry(model: ModelConfig, folder: Path, _: Mapping[str, Any], __: Iterable[str]) -> LTX2Geometry:
    """Read the configurations of a checkpoint.

    Raises:
        CheckpointError: one is malformed, they do not fit each other, or are of a model that is not known here.
        KeyError: one lacks a number.
    """
    connectors, transformer, vae, audio = (
        read_config(FAMILY.components[name], folder, name) for name in ("connectors", "transformer", "vae", "audio_vae")
    )
    geometry = LTX2Geometry(
        text_dim=_width(connectors, "video"),
        max_sequence_length=model.max_sequence_length,
        latent_channels=vae["latent_channels"],
        spatial_factor=vae["spatial_compression_ratio"],
        temporal_factor=vae["temporal_compression_ratio"],
        audio_text_dim=_width(connectors, "audio"),
        audio_channels=audio["latent_channels"],
        audio_bins=audio["mel_bins"] // AUDIO_FACTOR,
        audio_rate=audio["sample_rate"] / audio["mel_hop_length"] / AUDIO_FACTOR,
    )
    _check_kind(model, connectors, transformer, vae)
    _check_fit(model, geometry, connectors, transformer, audio)
    return geometry


def _width(connectors: Mapping[str, Any], kind: str) -> int:
    heads, dim = (connectors[f"{kind}_connector_{name}"] for name in ("num_attention_heads", "attention_head_dim"))
    return int(heads * dim)


def _check_kind(
    model: ModelConfig, connectors: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> None:
    """Refuse models of the same classes that compute otherwise."""
    for wrong, what in (
        (connectors.get("per_modality_projections", False), "per_modality_projections, of LTX-2.3"),
        (transformer.get("cross_attn_mod", False), "cross_attn_mod, of LTX-2.3"),
        (transformer.get("patch_size", 1) != 1 or transformer.get("patch_size_t", 1) != 1, "a patch_size other than 1"),
        (vae.get("timestep_conditioning", False), "timestep_conditioning, noise for its decoder"),
        (any(vae.get("decoder_inject_noise") or ()), "decoder_inject_noise, which no seed governs"),
    ):
        if wrong:
            raise CheckpointError(f"model.path: {model.path!r} has {what}, which is not supported")


def _check_fit(
    model: ModelConfig,
    geometry: LTX2Geometry,
    connectors: Mapping[str, Any],
    transformer: Mapping[str, Any],
    audio: Mapping[str, Any],
) -> None:
    """Refuse components whose numbers contradict each other: each stage computes with its own."""
    spans = [geometry.temporal_factor, geometry.spatial_factor, geometry.spatial_factor]
    bins, rate = geometry.audio_channels * geometry.audio_bins, model.traits.sound_rate
    for name, found, wanted in (
        ("transformer.in_channels", transformer["in_channels"], geometry.latent_channels),
        ("transformer.vae_scale_factors", list(transformer["vae_scale_factors"]), spans),
        ("transformer.caption_channels", transformer["caption_channels"], geometry.text_dim),
        ("transformer.audio_in_channels", transformer["audio_in_channels"], bins),
        ("transformer.audio_sampling_rate", transformer["audio_sampling_rate"], audio["sample_rate"]),
        ("transformer.audio_hop_length", transformer["audio_hop_length"], audio["mel_hop_length"]),
        ("transformer.audio_scale_factor", transformer["audio_scale_factor"], AUDIO_FACTOR),
        ("audio_vae.base_channels", audio["base_channels"], bins),
        ("audio_vae's latents a second", geometry.audio_rate, rate),
        ("vae.spatial_compression_ratio", geometry.spatial_factor, model.traits.multiple),
        ("vae.temporal_compression_ratio", geometry.temporal_factor, model.traits.frames_step),
    ):
        if found != wanted:
            raise CheckpointError(
                f"model.path: {name} of {model.path!r} is {found}, and its other configurations say {wanted}"
            )
    for kind in ("video", "audio"):
        registers = connectors.get(f"{kind}_connector_num_learnable_registers") or 1
        if model.max_sequence_length % registers:
            raise CheckpointError(
                f"model.max_sequence_length: {model.max_sequence_length} is no multiple of the {registers} learnt "
                f"tokens that {model.path!r} pads texts with; write one"
            )

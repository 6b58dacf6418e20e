"""What runs Wan: diffusers' modular blocks of it, with ours in place of those that differ from the stock pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import WanLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.wan import Wan22Blocks, Wan22Image2VideoBlocks, WanBlocks, WanImage2VideoAutoBlocks
from torch import Tensor

from disagg_ray.config.options import BLEND, parse_part
from disagg_ray.models.blocks import SchedulerStep
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.model import Model
from disagg_ray.models.wan.blocks import cast_inputs, replace_blocks
from disagg_ray.models.wan.fusing import fuse_activation, fuse_rotary
from disagg_ray.models.wan.geometry import WanGeometry
from disagg_ray.models.wan.ti2v import ti2v_blocks
from disagg_ray.models.wan.tiles import Blend, DecodePart
from disagg_ray.models.wan.vace import vace_blocks

TRIGGERS = {"t2v": ("prompt",), "i2v": ("prompt", "image"), "flf2v": ("prompt", "image", "last_image")}
"""Inputs by which diffusers picks the blocks of a task."""


class WanModel(Model):
    """Wan 2.1 and 2.2."""

    lora_extras = ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder")  # of Wan 2.1's image-to-video models
    norms = (WanRMS_norm,)

    def blocks(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], SchedulerStep]:
        task, geometry = checkpoint.model.task, _geometry(checkpoint)
        if geometry.expand_timesteps:
            return replace_blocks(ti2v_blocks(geometry))
        if task == "vace":
            return replace_blocks(vace_blocks(geometry))
        model = _model_blocks(task, geometry)
        return replace_blocks(model.get_execution_blocks(**dict.fromkeys(TRIGGERS[task], True)).sub_blocks)

    def part_blocks(self, names: Sequence[str], num_parts: int, folder: Path) -> dict[str, Any]:
        parts: dict[str, Any] = {name: DecodePart(*part) for name in names if (part := parse_part(name))}
        if BLEND in names:
            parts[BLEND] = Blend(num_parts, folder / "vae")
        return parts

    def constants(self, geometry: Geometry) -> Mapping[str, int]:
        assert isinstance(geometry, WanGeometry)
        if geometry.expand_timesteps:  # whose own blocks read no property of the pipeline
            return {}
        return {
            "vae_scale_factor_spatial": geometry.spatial_factor,
            "vae_scale_factor_temporal": geometry.temporal_factor,
            "num_channels_latents": geometry.latent_channels,
        }

    def adapt(self, transformer: Any) -> None:
        transformer.register_forward_pre_hook(cast_inputs, with_kwargs=True)

    def fuse(self, transformer: Any) -> bool:
        fuse_rotary(transformer)
        fuse_activation(transformer)
        return True

    def convert_lora(self, transformer: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        converted = WanLoraLoaderMixin.lora_state_dict(weights)
        made: dict[str, Tensor] = WanLoraLoaderMixin._maybe_expand_t2v_lora_for_i2v(transformer, converted)
        return made


def _geometry(checkpoint: Checkpoint) -> WanGeometry:
    assert isinstance(checkpoint.geometry, WanGeometry)
    return checkpoint.geometry


def _model_blocks(task: str, geometry: Geometry) -> SequentialPipelineBlocks:
    """Return what `ModularPipeline.from_pretrained` would pick; it imports every pipeline there is to find out."""
    if geometry.two_transformers:
        return Wan22Blocks() if task == "t2v" else Wan22Image2VideoBlocks()
    return WanBlocks() if task == "t2v" else WanImage2VideoAutoBlocks()


MODEL = WanModel()

"""What runs HunyuanVideo 1.5: diffusers' modular blocks of it, with ours in place of those that differ from stock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15RMS_norm
from diffusers.modular_pipelines.hunyuan_video1_5.before_denoise import (
    HunyuanVideo15PrepareLatentsStep,
    HunyuanVideo15SetTimestepsStep,
)
from diffusers.modular_pipelines.hunyuan_video1_5.decoders import HunyuanVideo15VaeDecoderStep
from diffusers.modular_pipelines.hunyuan_video1_5.encoders import HunyuanVideo15VaeEncoderStep
from torch import Tensor

from disagg_ray.models.blocks import Stepping
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.hunyuan_video15.denoising import Denoise, DenoiseImage, PrepareImage, PrepareLatents, TextInput
from disagg_ray.models.hunyuan_video15.encoding import ImageEncoder, TextEncoder
from disagg_ray.models.model import Model


class HunyuanVideo15Model(Model):
    """HunyuanVideo 1.5, of a text, and of a text and a first frame."""

    norms = (HunyuanVideo15RMS_norm,)

    def blocks(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], Stepping]:
        encoders: dict[str, Any] = {}
        prepare: dict[str, Any] = {"denoise.prepare_latents": HunyuanVideo15PrepareLatentsStep()}
        denoise = Denoise()
        if checkpoint.model.traits.images:
            encoders = {"image_encoder": ImageEncoder(), "vae_encoder": HunyuanVideo15VaeEncoderStep()}
            prepare = {"denoise.prepare_latents": PrepareLatents(), "denoise.prepare_image": PrepareImage()}
            denoise = DenoiseImage()
        return {
            "text_encoder": TextEncoder(),
            **encoders,
            "denoise.input": TextInput(),
            "denoise.set_timesteps": HunyuanVideo15SetTimestepsStep(),
            **prepare,
            "denoise.denoise": denoise,
            "decode.decode": HunyuanVideo15VaeDecoderStep(),
        }, denoise.sub_blocks["after_denoiser"]

    def constants(self, geometry: Geometry) -> Mapping[str, int]:
        return {
            "vae_scale_factor_spatial": geometry.spatial_factor,
            "vae_scale_factor_temporal": geometry.temporal_factor,
            "num_channels_latents": geometry.latent_channels,
        }

    def convert_lora(self, transformer: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = HunyuanVideoLoraLoaderMixin.lora_state_dict(weights)
        return made


MODEL = HunyuanVideo15Model()

"""What runs Qwen-Image: diffusers' modular blocks of it, with ours in place of those that differ from stock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.modular_pipelines.qwenimage.before_denoise import (
    QwenImagePrepareLatentsStep,
    QwenImageSetTimestepsStep,
)
from diffusers.modular_pipelines.qwenimage.decoders import QwenImageDecoderStep

from disagg_ray.models.blocks import SchedulerStep
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.model import Model
from disagg_ray.models.qwen_image.blocks import AfterDenoise, Denoise, Postprocess, RopeInputs, TextEncoder, TextInput
from disagg_ray.models.qwen_image.edit import EditDenoise, EditInput, EditRopeInputs, EditTextEncoder, EncodeImages


class QwenImageModel(Model):
    """Qwen-Image, of text, and Qwen-Image-Edit, of text and images."""

    norms = (QwenImageRMS_norm,)

    def blocks(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], SchedulerStep]:
        task = checkpoint.model.traits
        text, given, rope, denoise = (
            (EditTextEncoder(task), EditInput(), EditRopeInputs(), EditDenoise())
            if task.images
            else (TextEncoder(), TextInput(), RopeInputs(), Denoise())
        )
        return {
            "text_encoder": text,
            **({"vae_encoder": EncodeImages(task)} if task.images else {}),
            "denoise.input": given,
            "denoise.prepare_latents": QwenImagePrepareLatentsStep(),
            "denoise.set_timesteps": QwenImageSetTimestepsStep(),
            "denoise.prepare_rope_inputs": rope,
            "denoise.denoise": denoise,
            "denoise.after_denoise": AfterDenoise(),
            "decode.decode": QwenImageDecoderStep(),
            "decode.postprocess": Postprocess(),
        }, denoise.sub_blocks["after_denoiser"]

    def constants(self, geometry: Geometry) -> Mapping[str, int]:
        return {"vae_scale_factor": geometry.spatial_factor, "num_channels_latents": geometry.latent_channels}


MODEL = QwenImageModel()

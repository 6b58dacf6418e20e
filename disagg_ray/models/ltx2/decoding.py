"""Blocks after the denoise: frames and sound. They compute exactly what diffusers 0.42's `LTX2Pipeline` computes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.pipelines.ltx2 import LTX2Vocoder
from diffusers.video_processor import VideoProcessor

from disagg_ray.graph import FRAMES, SOUND
from disagg_ray.media.sound import Sound


class DecodeFrames(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes frames of latents, which come normalised, in the precision of the text embeddings as in stock."""

    model_name = "ltx2"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        config = FrozenDict({"vae_scale_factor": 32})
        processor = ComponentSpec(
            "video_processor", VideoProcessor, config=config, default_creation_method="from_config"
        )
        return [ComponentSpec("vae", AutoencoderKLLTX2Video), processor]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(FRAMES)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        vae, latents = components.vae, state.get("latents")
        mean, std = (numbers.view(1, -1, 1, 1, 1).to(latents) for numbers in (vae.latents_mean, vae.latents_std))
        latents = latents * std / vae.config.scaling_factor + mean
        made = vae.decode(latents.to(vae.dtype), None, return_dict=False)[0]
        state.set(FRAMES, components.video_processor.postprocess_video(made, output_type="np"))
        return components, state


class DecodeSound(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes a spectrogram of latents (1, latents, channels x bins), and samples of that."""

    model_name = "ltx2"

    def __init__(self, audio_bins: int) -> None:
        self._audio_bins = audio_bins
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("audio_vae", AutoencoderKLLTX2Audio), ComponentSpec("vocoder", LTX2Vocoder)]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("audio_latents", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(SOUND)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        vae, vocoder, latents = components.audio_vae, components.vocoder, state.get("audio_latents")
        latents = latents * vae.latents_std.to(latents) + vae.latents_mean.to(latents)
        latents = latents.unflatten(2, (-1, self._audio_bins)).transpose(1, 2)
        samples = vocoder(vae.decode(latents.to(vae.dtype), return_dict=False)[0])
        state.set(SOUND, Sound(samples[0].float().cpu().numpy(), vocoder.config.output_sampling_rate))
        return components, state

"""Our own blocks of the denoise, where diffusers' modular ones of HunyuanVideo 1.5 differ from its stock pipeline."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.hunyuan_video1_5.before_denoise import (
    HunyuanVideo15Image2VideoPrepareLatentsStep,
    HunyuanVideo15PrepareLatentsStep,
)
from diffusers.modular_pipelines.hunyuan_video1_5.denoise import (
    HunyuanVideo15DenoiseStep,
    HunyuanVideo15Image2VideoLoopDenoiser,
    HunyuanVideo15LoopAfterDenoiser,
    HunyuanVideo15LoopBeforeDenoiser,
    HunyuanVideo15LoopDenoiser,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from disagg_ray.models.blocks import SchedulerStep
from disagg_ray.models.hunyuan_video15.geometry import PARTS, TEXTS

EMBEDS = tuple(f"{text}_{part}" for text in TEXTS for part in PARTS)


class TextInput(ModularPipelineBlocks):  # type: ignore[misc]
    """Brings embeddings and masks to the transformer's precision, as stock does where it encodes them."""

    model_name = "hunyuan-video-1.5"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("transformer", HunyuanVideo15Transformer3DModel)]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(name, required=name.startswith(TEXTS[0])) for name in EMBEDS]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("batch_size")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        for name in EMBEDS:
            if (tensor := state.get(name)) is not None:
                state.set(name, tensor.to(components.transformer.dtype))
        state.set("batch_size", 1)
        return components, state


class _TakesEmbeds:
    """A block that makes no embeddings of an image: those of the encoder reach the denoise."""

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [output for output in super().intermediate_outputs if output.name != "image_embeds"]  # type: ignore[misc]


class PrepareLatents(_TakesEmbeds, HunyuanVideo15PrepareLatentsStep):  # type: ignore[misc]
    """Draws the noise; diffusers' block puts zeros in the place of an image's embeddings, also where there is one."""


class PrepareImage(_TakesEmbeds, HunyuanVideo15Image2VideoPrepareLatentsStep):  # type: ignore[misc]
    """Makes the first frame's latents a condition of the video's, with a mask of it."""


class Stepper(SchedulerStep, HunyuanVideo15LoopAfterDenoiser):  # type: ignore[misc]
    """Steps the scheduler of HunyuanVideo 1.5."""


class Denoise(HunyuanVideo15DenoiseStep):  # type: ignore[misc]
    """Denoises, and hands latents on in float32, which is exact: stock rounds them to the VAE's precision next."""

    block_classes: ClassVar = [HunyuanVideo15LoopBeforeDenoiser, HunyuanVideo15LoopDenoiser, Stepper]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        components, state = super().__call__(components, state)
        state.set("latents", state.get("latents").float())
        return components, state


class DenoiseImage(Denoise):
    """Denoises a video of a given first frame; distilled models get the timestep that each step leads to."""

    block_classes: ClassVar = [HunyuanVideo15LoopBeforeDenoiser, HunyuanVideo15Image2VideoLoopDenoiser, Stepper]

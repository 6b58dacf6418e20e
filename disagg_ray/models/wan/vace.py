"""Blocks of Wan 2.1 VACE, of which diffusers has modular ones for two transformers alone.

Together they compute what `WanVACEPipeline` computes. The control of a request, which is that of an empty video where
none is given, is made beside the text's embeddings and given to the transformer at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanVACETransformer3DModel
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan import WanBlocks
from diffusers.modular_pipelines.wan.decoders import WanVaceTrimReferenceLatentsStep
from diffusers.modular_pipelines.wan.denoise import WanLoopDenoiser
from diffusers.modular_pipelines.wan.encoders import WanVaceEncoderStep
from diffusers.utils.torch_utils import randn_tensor

from disagg_ray.models.geometry import Geometry

CONTROL, SCALE = "control_hidden_states", "control_hidden_states_scale"
"""The control, float32 (1, channels, frames of references and of the video, height, width); one factor a layer."""
FIELDS = {"encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"), CONTROL: CONTROL, SCALE: SCALE}
"""What the transformer is given, with the prompt and with the negative prompt."""


def vace_blocks(geometry: Geometry) -> dict[str, Any]:
    """Return the leaf blocks in order, named as those of the other Wan models."""
    blocks = dict(WanBlocks().get_execution_blocks(prompt=True).sub_blocks)
    text, decode = {"text_encoder": blocks.pop("text_encoder")}, {"decode": blocks.pop("decode")}
    blocks["denoise.denoise"].sub_blocks["denoiser"] = WanLoopDenoiser(FIELDS)
    own = {"denoise.prepare_latents": PrepareLatents(geometry), "denoise.denoise": blocks.pop("denoise.denoise")}
    trim = {"denoise.trim_latents": WanVaceTrimReferenceLatentsStep()}
    return text | {"vae_encoder": EncodeControl()} | blocks | own | trim | decode


class EncodeControl(WanVaceEncoderStep):  # type: ignore[misc]
    """Makes the control of a video, its mask and references, of whichever are given; a mask of one image is for all."""

    model_name = "wan"

    @property
    def inputs(self) -> list[InputParam]:
        return [param for param in super().inputs if param.name != "conditioning_scale"]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(CONTROL)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        video, mask, references = (state.get(name) for name in ("video", "mask", "reference_images"))
        if mask is not None and len(mask) == 1:
            mask = mask * len(video)
        size = (state.get("height"), state.get("width"), state.get("num_frames"))
        device = components._execution_device
        conditions = (components, video, mask, references, *size, torch.float32, device)
        video, mask, references = self.preprocess_conditions(*conditions)
        latents = self.prepare_video_latents(components, video, mask, references, None, device)
        state.set(CONTROL, torch.cat([latents, self.prepare_masks(components, mask, references)], dim=1).float())
        return components, state


class PrepareLatents(ModularPipelineBlocks):  # type: ignore[misc]
    """Draws the first noise, of the video's frames and of one latent frame a reference, and scales the control."""

    model_name = "wan"

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("transformer", WanVACETransformer3DModel)]

    @property
    def inputs(self) -> list[InputParam]:
        fields = ("height", "width", "num_frames", "num_reference_images", "conditioning_scale", "generator")
        return [InputParam(name, required=True) for name in fields]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents"), OutputParam(SCALE)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        num_frames = state.get("num_frames") + state.get("num_reference_images") * self._geometry.temporal_factor
        shape = self._geometry.latents_shape(state.get("height"), state.get("width"), num_frames)
        device, generator = components._execution_device, state.get("generator")
        state.set("latents", randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))
        num_layers = len(components.transformer.config.vace_layers)
        state.set(SCALE, torch.full((num_layers,), state.get("conditioning_scale"), device=device))
        return components, state

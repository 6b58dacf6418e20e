"""Blocks of Wan 2.2 TI2V, one model for text and for a first frame, for which diffusers has no modular ones.

Each computes what `WanPipeline`, without an image, and `WanImageToVideoPipeline`, with one, compute where
`expand_timesteps` is set: every token has a timestep of its own, and those of a given first frame have 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam
from diffusers.modular_pipelines.wan import WanBlocks
from diffusers.modular_pipelines.wan.before_denoise import WanPrepareLatentsStep
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep, WanLoopBeforeDenoiser
from diffusers.modular_pipelines.wan.encoders import WanVaeEncoderStep
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from disagg_ray.models.first_frame import IMAGE_LATENTS, EncodeFirstFrame
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.wan.blocks import normalise


def ti2v_blocks(geometry: Geometry) -> dict[str, Any]:
    """Return the leaf blocks in order, named as those of the other Wan models."""
    blocks = dict(WanBlocks().get_execution_blocks(prompt=True).sub_blocks)
    text = {"text_encoder": blocks.pop("text_encoder")}
    own = {"denoise.prepare_latents": PrepareLatents(geometry), "denoise.denoise": Denoise()}
    return text | {"vae_encoder": EncodeImage()} | blocks | own


class EncodeImage(EncodeFirstFrame):
    """Makes latents of the request's image, if it has one; the other models encode a whole video of it."""

    model_name = "wan"
    processor = "video_processor"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return list(WanVaeEncoderStep().expected_components)

    normalise = staticmethod(normalise)


class PrepareLatents(WanPrepareLatentsStep):  # type: ignore[misc]
    """Draws the first noise in the checkpoint's shape; diffusers' takes Wan 2.1's where the stage has no VAE."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        super().__init__()

    def prepare_latents(
        self, _: Any, height: int, width: int, num_frames: int, dtype: Any, device: Any, generator: Any, **__: Any
    ) -> Tensor:
        shape = self._geometry.latents_shape(height, width, num_frames)
        noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise


class BlendFirstFrame(WanLoopBeforeDenoiser):  # type: ignore[misc]
    """Gives the transformer the image's latents in place of the first frame's."""

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        latents = _blend(block_state.latents, block_state.image_latents)
        block_state.latent_model_input = latents.to(block_state.dtype)
        return components, block_state

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam(IMAGE_LATENTS)]


class Denoise(WanDenoiseStep):  # type: ignore[misc]
    """Denoises with a timestep a token, then puts the image's latents back."""

    block_classes: ClassVar = [BlendFirstFrame, *WanDenoiseStep.block_classes[1:]]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        latents, image = state.get("latents"), state.get(IMAGE_LATENTS)
        expand = partial(_expand_timestep, _mask(latents, image)[0, 0, :, ::2, ::2].flatten())
        hook = components.transformer.register_forward_pre_hook(expand, with_kwargs=True)
        try:
            components, state = super().__call__(components, state)
        finally:
            hook.remove()
        state.set("latents", _blend(state.get("latents"), image))
        return components, state


def _mask(latents: Tensor, image: Tensor | None) -> Tensor:
    """Return 1 where latents are made, 0 in the first frame where an image gives it: (1, 1, frames, height, width)."""
    mask = torch.ones((1, 1, *latents.shape[2:]), device=latents.device)
    if image is not None:
        mask[:, :, 0] = 0
    return mask


def _blend(latents: Tensor, image: Tensor | None) -> Tensor:
    if image is None:
        return latents
    mask = _mask(latents, image)
    return (1 - mask) * image + mask * latents


def _expand_timestep(
    mask: Tensor, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a transformer's call a timestep (batch, tokens), from one (batch,) and the tokens' mask."""
    timestep = kwargs["timestep"]
    return args, {**kwargs, "timestep": mask * timestep[:, None]}

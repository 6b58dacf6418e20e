"""Our own blocks, where diffusers' modular ones differ from its stock Wan pipelines.

Each takes the place of one block of diffusers 0.42 and computes exactly what `WanPipeline` and
`WanImageToVideoPipeline` compute, which the parity tests hold to a maximum difference of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.modular_pipelines.wan.before_denoise import WanTextInputStep
from diffusers.modular_pipelines.wan.denoise import Wan22LoopDenoiser, WanLoopAfterDenoiser, WanLoopDenoiser
from diffusers.modular_pipelines.wan.encoders import (
    WanImageCropResizeStep,
    WanImageResizeStep,
    WanTextEncoderStep,
    get_t5_prompt_embeds,
    prompt_clean,
)

from disagg_ray.models.blocks import KeepsTexts, SchedulerStep
from disagg_ray.models.prompts import check_length


class TextEncoder(KeepsTexts, WanTextEncoderStep):  # type: ignore[misc]
    """Encodes the negative prompt only under guidance (diffusers' fails without), and refuses to truncate."""

    def encode_prompt(
        self,
        components: Any,
        prompt: str,
        device: torch.device,
        prepare_unconditional_embeds: bool,
        negative_prompt: str | None,
        max_sequence_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        texts = {"prompt": prompt} | (
            {"negative_prompt": negative_prompt or ""} if prepare_unconditional_embeds else {}
        )
        for field, text in texts.items():
            check_length(field, components.tokenizer, prompt_clean(text), max_sequence_length)
        embeds = [self._encode(components, text, max_sequence_length, device) for text in texts.values()]
        return embeds[0], embeds[1] if len(embeds) > 1 else None

    def _encode(self, components: Any, text: str, max_sequence_length: int, device: torch.device) -> torch.Tensor:
        encoder, tokenizer = components.text_encoder, components.tokenizer
        encode = partial(get_t5_prompt_embeds, encoder, tokenizer, text, max_sequence_length, device)
        return self.keep((text, max_sequence_length), encode)


class KeepImage(ModularPipelineBlocks):  # type: ignore[misc]
    """Passes an image on as it is: the VAE's processor resizes it, and CLIP's its own copy, as in the stock pipeline.

    Diffusers' resize blocks change the requested size to the image's aspect, or crop.
    """

    model_name = "wan"

    def __init__(self, source: str = "image") -> None:
        self._source = source
        super().__init__()

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(self._source, required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(f"resized_{self._source}")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        state.set(f"resized_{self._source}", state.get(self._source))
        return components, state


class TextInput(WanTextInputStep):  # type: ignore[misc]
    """Lets embeddings enter the denoising loop in float32, whichever stage made them: see `cast_inputs`."""

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if (embeds := state.get(name)) is not None:
                state.set(name, embeds.float(), "denoiser_input_fields")
        components, state = super().__call__(components, state)
        return components, state


class Denoiser(WanLoopDenoiser):  # type: ignore[misc]
    """Does without negative embeddings when guidance is off; diffusers' demands them always."""

    @property
    def inputs(self) -> list[InputParam]:
        return _without_negative(super().inputs)


class TwoDenoisers(Wan22LoopDenoiser):  # type: ignore[misc]
    """The same of Wan 2.2."""

    @property
    def inputs(self) -> list[InputParam]:
        return _without_negative(super().inputs)


def _without_negative(inputs: list[InputParam]) -> list[InputParam]:
    return [replace(param, required=param.required and param.name != "negative_prompt_embeds") for param in inputs]


class WanSchedulerStep(SchedulerStep, WanLoopAfterDenoiser):  # type: ignore[misc]
    """Steps the scheduler of Wan."""


def replace_blocks(blocks: Mapping[str, Any]) -> tuple[dict[str, Any], SchedulerStep]:
    """Return the leaf blocks with ours in place of those that differ, and the one that steps the scheduler."""
    stepper = WanSchedulerStep()
    replaced: dict[str, Any] = {}
    for name, block in blocks.items():
        match block:
            case WanTextEncoderStep():
                replaced[name] = TextEncoder()
            case WanTextInputStep():
                replaced[name] = TextInput()
            case WanImageResizeStep():
                replaced[name] = KeepImage("image")
            case WanImageCropResizeStep():
                replaced[name] = KeepImage("last_image")
            case _:
                replaced[name] = block
                if "after_denoiser" in block.sub_blocks:
                    kind = TwoDenoisers if isinstance(block.sub_blocks["denoiser"], Wan22LoopDenoiser) else Denoiser
                    block.sub_blocks["denoiser"] = kind(block.sub_blocks["denoiser"]._guider_input_fields)
                    block.sub_blocks["after_denoiser"] = stepper
    return replaced, stepper


def cast_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Bring a transformer's tensors to its precision, all but the timestep: a forward pre-hook.

    Diffusers' modular loop rounds the timestep to the embeddings' precision (999 becomes 1000 in bfloat16), the stock
    loop does not. Embeddings therefore enter the loop in float32, which is exact, and are rounded here.
    """
    dtype = module.dtype
    cast = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and name != "timestep" else value
        for name, value in kwargs.items()
    }
    return args, cast

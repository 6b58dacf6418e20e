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
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.before_denoise import WanSetTimestepsStep, WanTextInputStep
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.denoise import Wan22LoopDenoiser, WanLoopAfterDenoiser, WanLoopDenoiser
from diffusers.modular_pipelines.wan.encoders import (
    WanFirstLastFrameVaeEncoderStep,
    WanImageCropResizeStep,
    WanImageResizeStep,
    WanTextEncoderStep,
    WanVaeEncoderStep,
    get_t5_prompt_embeds,
    prompt_clean,
)
from torch import Tensor

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


class EncodeFrames(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes latents of a video of which the first frame is given, or the first and the last.

    Diffusers' blocks bring them to their mean and deviation in the VAE's precision, the stock pipeline in float32.
    """

    model_name = "wan"

    def __init__(self, replaced: WanVaeEncoderStep | WanFirstLastFrameVaeEncoderStep) -> None:
        self._replaced = replaced
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return list(self._replaced.expected_components)

    @property
    def inputs(self) -> list[InputParam]:
        return list(self._replaced.inputs)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return list(self._replaced.intermediate_outputs)

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        vae, size = components.vae, {"height": state.get("height"), "width": state.get("width")}
        images = [state.get(param.name) for param in self.inputs if param.name.startswith("resized_")]
        first, *last = (components.video_processor.preprocess(image, **size).unsqueeze(2) for image in images)
        blank = first.new_zeros(*first.shape[:2], state.get("num_frames") - len(images), *first.shape[3:])
        video = torch.cat([first, blank, *last], dim=2).to(components._execution_device, vae.dtype)
        latents = vae.encode(video).latent_dist.mode().float()
        state.set(self.intermediate_outputs[0].name, normalise(vae, latents))
        return components, state


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """Return latents, float32 (1, channels, frames, height, width), as the transformer takes them."""
    mean, std = (
        torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents.device)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) * (1.0 / std)


class Decode(WanVaeDecoderStep):  # type: ignore[misc]
    """Makes frames of latents that are rounded to the VAE's precision at once, as in the stock pipeline.

    Diffusers' block undoes `normalise` in float32 first.
    """

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        latents = state.get("latents")
        state.set("latents", latents.to(components.vae.dtype))
        components, state = super().__call__(components, state)
        state.set("latents", latents)
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


class SetTimesteps(WanSetTimestepsStep):  # type: ignore[misc]
    """Has the scheduler begin with its first step, as `WanPipeline` does.

    Left to find it by its timestep, UniPC takes the second one where a large shift and many steps round the first two
    to the same number, and runs out of steps.
    """

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        components, state = super().__call__(components, state)
        if hasattr(components.scheduler, "set_begin_index"):
            components.scheduler.set_begin_index(0)
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
            case WanSetTimestepsStep():
                replaced[name] = SetTimesteps()
            case WanVaeEncoderStep() | WanFirstLastFrameVaeEncoderStep():
                replaced[name] = EncodeFrames(block)
            case WanVaeDecoderStep():
                replaced[name] = Decode()
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

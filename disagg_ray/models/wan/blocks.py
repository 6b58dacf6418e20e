"""Our own blocks, where diffusers' modular ones differ from its stock Wan pipelines.

Each takes the place of one block of diffusers 0.42 and computes exactly what `WanPipeline` and
`WanImageToVideoPipeline` compute, which the parity tests hold to a maximum difference of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import ClassifierFreeGuidance
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

from disagg_ray.models.prompts import check_length

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks

OnStep = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all); may raise to stop."""


class EmbeddingCache(Protocol):
    """Where embeddings are kept for the next request with the same text."""

    def get(self, key: Hashable) -> torch.Tensor | None: ...

    def put(self, key: Hashable, tensor: torch.Tensor) -> None: ...


class Guidance(ClassifierFreeGuidance):  # type: ignore[misc]
    """Classifier-free guidance that is on or off for both transformers alike, as in the stock pipelines.

    Diffusers' own turns itself off for a scale of exactly 1, which the second transformer's may be.
    """

    scheduler: Any = None
    """The request's, for step caches that go by the noise level."""
    ranks: Ranks | None = None
    """Of which one half predicts with the prompt, and the other one with the negative prompt."""

    def _is_cfg_enabled(self) -> bool:
        return bool(self._enabled)

    @property
    def _halved(self) -> bool:
        return self.ranks is not None and self.ranks.parallel.cfg > 1 and self._is_cfg_enabled()

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Return the batches that this rank predicts."""
        batches: list[Any] = super().prepare_inputs_from_block_state(data, input_fields)
        if not self._halved:
            return batches
        assert self.ranks is not None
        self._count_prepared = self.ranks.branch  # the batches before it are the other half's
        return [batches[self.ranks.branch]]

    def __call__(self, data: list[Any]) -> Any:
        """Return the guided prediction, the same on every rank."""
        if not self._halved:
            return super().__call__(data)
        assert self.ranks is not None
        return self.forward(*self.ranks.gather_branches(data[0].noise_pred))

    def prepare_models(self, denoiser: Any) -> None:
        """Tell step caches which pass of which step follows, as the stock pipelines do; diffusers' blocks do not."""
        super().prepare_models(denoiser)
        if denoiser.is_cache_enabled:
            self._pass = denoiser.cache_context(
                "cond" if self.is_conditional else "uncond",
                step_index=self._step,
                sigma=float(self.scheduler.sigmas[self._step]),
                num_inference_steps=self._num_inference_steps,
            )
            self._pass.__enter__()

    def cleanup_models(self, denoiser: Any) -> None:
        super().cleanup_models(denoiser)
        if denoiser.is_cache_enabled:
            self._pass.__exit__(None, None, None)


class TextEncoder(WanTextEncoderStep):  # type: ignore[misc]
    """Encodes the negative prompt only under guidance (diffusers' fails without), and refuses to truncate.

    With a `cache` it encodes no text twice: embeddings are the same in either prompt.
    """

    cache: EmbeddingCache | None = None

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
        key = (text, max_sequence_length)
        embeds = None if self.cache is None else self.cache.get(key)
        if embeds is None:
            encoder, tokenizer = components.text_encoder, components.tokenizer
            embeds = get_t5_prompt_embeds(encoder, tokenizer, text, max_sequence_length, device)
            if self.cache is not None:
                self.cache.put(key, embeds)
        return embeds


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


class SchedulerStep(WanLoopAfterDenoiser):  # type: ignore[misc]
    """Steps the scheduler with the prediction in the transformer's own precision, then calls `on_step`.

    Diffusers' modular block converts the prediction to float32 first, which differs from stock in bfloat16. Schedulers
    that draw noise draw it from the request's generator, where the first noise came from; diffusers' blocks and stock
    pipelines leave that to torch's global one, so stock makes these frames after `torch.manual_seed(seed)`.
    """

    on_step: OnStep | None = None

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam("generator")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        step = components.scheduler.step
        draws = {"generator": block_state.generator} if "generator" in signature(step).parameters else {}
        block_state.latents = step(block_state.noise_pred, t, block_state.latents, **draws, return_dict=False)[0]
        if self.on_step is not None:
            self.on_step(i + 1, block_state.num_inference_steps)
        return components, block_state


def replace_blocks(blocks: Mapping[str, Any]) -> tuple[dict[str, Any], SchedulerStep]:
    """Return the leaf blocks with ours in place of those that differ, and the one that steps the scheduler."""
    stepper = SchedulerStep()
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

"""What blocks of every family share: guidance, the step of a scheduler, kept embeddings."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks

OnStep = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all); may raise to stop."""


class EmbeddingCache(Protocol):
    """Where embeddings are kept for the next request with the same text."""

    def get(self, key: Hashable) -> torch.Tensor | None: ...

    def put(self, key: Hashable, tensor: torch.Tensor) -> None: ...


class Stepping(Protocol):
    """A block that calls `on_step` after each denoising step."""

    on_step: OnStep | None


class KeepsTexts:
    """A block that, with a `cache`, encodes no text twice: embeddings are the same in either prompt."""

    cache: EmbeddingCache | None = None

    def keep(self, key: Hashable, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what the cache has of a text, or else encode it."""
        embeds = None if self.cache is None else self.cache.get(key)
        if embeds is None:
            embeds = encode()
            if self.cache is not None:
                self.cache.put(key, embeds)
        return embeds


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


class SchedulerStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Steps the scheduler with the prediction in the transformer's own precision, then calls `on_step`.

    Diffusers' modular blocks convert the prediction to float32 first, which differs from stock in bfloat16. Schedulers
    that draw noise draw it from the request's generator, where the first noise came from; diffusers' blocks and stock
    pipelines leave that to torch's global one, so stock makes these frames after `torch.manual_seed(seed)`.
    A base beside the block that it replaces.
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

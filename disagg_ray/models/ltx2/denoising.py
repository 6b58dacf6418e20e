"""The denoise of LTX-2: video and sound step together, each with a scheduler and a scale of guidance of its own.

It computes exactly what diffusers 0.42's `LTX2Pipeline` and, with a first frame, `LTX2ImageToVideoPipeline` compute;
its modular blocks predict with and without the prompt one after the other, and stock in one batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.ltx2.before_denoise import calculate_shift
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.pipelines.ltx2.pipeline_ltx2 import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from disagg_ray.errors import RequestError
from disagg_ray.models.blocks import OnStep
from disagg_ray.models.first_frame import IMAGE_LATENTS
from disagg_ray.models.ltx2.encoding import EMBEDS
from disagg_ray.models.ltx2.geometry import LTX2Geometry

SHIFT = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
"""Of schedulers that do not say, as in stock."""
NOTHING = None, None
"""In place of a pass that is not made."""


@dataclass
class _Stream:
    """Latents of video or of sound as tokens (1, tokens, channels), float32, and what steps them."""

    tokens: Tensor
    scheduler: Any
    scale: float
    """Of guidance."""
    stg_scale: float
    """Of guidance away from what is made while one block does not attend."""
    modality_scale: float
    """Of guidance away from what is made without the other stream."""
    rescale: float
    """Share of the guided prediction that gets the deviation of the one with the prompt."""

    def guide(self, predicted: Tensor, perturbed: Tensor | None, isolated: Tensor | None, step: int) -> Tensor:
        """Return the velocity that a prediction comes to, (texts, tokens, channels), under guidance of two texts.

        `perturbed` and `isolated`: those of the prompt (1, tokens, channels) while one block does not attend, and
        without the other stream.
        """
        sigma = self.scheduler.sigmas[step]
        *without, positive = (self.tokens - part * sigma for part in predicted.float().chunk(len(predicted)))
        guided = positive
        for negative in without:
            guided = guided + (self.scale - 1) * (positive - negative)
        if perturbed is not None:
            guided = guided + self.stg_scale * (positive - (self.tokens - perturbed.float() * sigma))
        if isolated is not None:
            guided = guided + (self.modality_scale - 1) * (positive - (self.tokens - isolated.float() * sigma))
        if self.rescale > 0:
            guided = rescale_noise_cfg(guided, positive, self.rescale)
        velocity: Tensor = (self.tokens - guided) / sigma
        return velocity


class Denoise(ModularPipelineBlocks):  # type: ignore[misc]
    """Draws noise and denoises it; latents leave in the precision of the text embeddings, as stock decodes them."""

    model_name = "ltx2"
    on_step: OnStep | None = None

    def __init__(self, geometry: LTX2Geometry) -> None:
        self._geometry = geometry
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("transformer", LTX2VideoTransformer3DModel),
            ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        asked = ("request", "generator", "height", "width", "num_frames", "num_inference_steps")
        required = [InputParam(name, required=True) for name in (*EMBEDS, *asked)]
        return [*required, InputParam(IMAGE_LATENTS), InputParam("sigmas")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents"), OutputParam("audio_latents")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        request, first = state.get("request"), state.get(IMAGE_LATENTS)
        shape = self._geometry.latents_shape(request.height, request.width, request.num_frames)
        video, sound = self._draw(components, state, shape)
        timesteps = video.scheduler.timesteps
        texts = dict(zip(("text", "audio_text", "mask"), (state.get(name) for name in EMBEDS), strict=True))
        predict = _Predictor(components.transformer, texts, shape, sound.tokens.shape[1], request.fps, first)
        passes = _more_passes(video, sound, request.stg_block, len(components.transformer.transformer_blocks))
        for step, t in enumerate(timesteps):
            predicted, predicted_sound = predict(video.tokens, sound.tokens, t)
            perturbed, isolated = (
                predict.alone(video.tokens, sound.tokens, t, **changed) if changed else NOTHING for changed in passes
            )
            velocity = video.guide(predicted, perturbed[0], isolated[0], step)
            sound_velocity = sound.guide(predicted_sound, perturbed[1], isolated[1], step)
            video.tokens = _step(video, velocity, t, shape, first is not None)
            sound.tokens = sound.scheduler.step(sound_velocity, t, sound.tokens, return_dict=False)[0]
            if self.on_step is not None:
                self.on_step(step + 1, len(timesteps))
        state.set("latents", _unpack(video.tokens, shape).to(texts["text"].dtype))
        state.set("audio_latents", sound.tokens)
        return components, state

    def _draw(self, components: Any, state: Any, shape: tuple[int, ...]) -> tuple[_Stream, _Stream]:
        """Return the first noise of video, then of sound, each with a scheduler whose timesteps are set."""
        request, first, generator = state.get("request"), state.get(IMAGE_LATENTS), state.get("generator")
        device, geometry = components._execution_device, self._geometry
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if first is not None:
            given = torch.zeros((1, 1, *shape[2:]), device=device)
            given[:, :, 0] = 1.0
            latents = first.repeat(1, 1, shape[2], 1, 1) * given + latents * (1 - given)
        num_audio = geometry.num_audio_latents(request.num_frames, request.fps)
        audio_shape = (1, geometry.audio_channels, num_audio, geometry.audio_bins)
        audio = randn_tensor(audio_shape, generator=generator, device=device, dtype=torch.float32)
        tokens, scheduler = _pack(latents), components.scheduler
        steps, sigmas = state.get("num_inference_steps"), state.get("sigmas")
        sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        mu = calculate_shift(tokens.shape[1], *(scheduler.config.get(name, number) for name, number in SHIFT.items()))
        scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
        stg, modality, rescale = request.stg_scale, request.modality_scale, request.guidance_rescale
        sound_modality, sound_rescale = request.audio_modality_scale, request.audio_guidance_rescale
        audio_tokens, audio_scheduler = audio.transpose(1, 2).flatten(2, 3), copy.deepcopy(scheduler)
        streams = (
            _Stream(tokens, scheduler, request.guidance_scale, stg, modality, rescale),
            _Stream(  # 0 is the video's too, as in stock
                audio_tokens, audio_scheduler, request.sound_guidance_scale, request.audio_stg_scale or stg,
                sound_modality or modality, sound_rescale or rescale,
            ),
        )  # fmt: skip
        for stream in streams:
            stream.scheduler.set_begin_index(0)
        return streams


class _Predictor:
    """Calls the transformer with what is the same in every step."""

    def __init__(
        self,
        transformer: Any,
        texts: dict[str, Tensor],
        shape: tuple[int, ...],
        num_audio: int,
        fps: float,
        first: Tensor | None,
    ) -> None:
        self._transformer, self._dtype = transformer, transformer.dtype
        self._num_texts = len(texts["text"])
        device, (_, _, frames, height, width) = texts["text"].device, shape
        video = transformer.rope.prepare_video_coords(1, frames, height, width, device, fps=float(fps))
        sound = transformer.audio_rope.prepare_audio_coords(1, num_audio, device)
        self._given = {
            "encoder_hidden_states": texts["text"].to(self._dtype),
            "audio_encoder_hidden_states": texts["audio_text"].to(self._dtype),
            "encoder_attention_mask": texts["mask"],
            "audio_encoder_attention_mask": texts["mask"],
            "num_frames": frames,
            "height": height,
            "width": width,
            "fps": float(fps),
            "audio_num_frames": num_audio,
            "video_coords": video.repeat((self._num_texts,) + (1,) * (video.ndim - 1)),
            "audio_coords": sound.repeat((self._num_texts,) + (1,) * (sound.ndim - 1)),
            "use_cross_timestep": True,
            "return_dict": False,
        }
        self._kept: Tensor | None = None
        """Which tokens are of the given first frame: (texts, tokens)."""
        if first is not None:
            kept = torch.zeros((1, 1, *shape[2:]), device=device)
            kept[:, :, 0] = 1.0
            self._kept = torch.cat([_pack(kept).squeeze(-1)] * self._num_texts)

    def __call__(self, video: Tensor, sound: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions (texts, tokens, channels) of video and of sound."""
        return self._predict(video, sound, t, self._num_texts, self._given)

    def alone(self, video: Tensor, sound: Tensor, t: Tensor, **changed: Any) -> tuple[Tensor, Tensor]:
        """Return those of the prompt alone (1, tokens, channels), with other arguments of the transformer."""
        given = {name: value[-1:] if isinstance(value, Tensor) else value for name, value in self._given.items()}
        return self._predict(video, sound, t, 1, given | changed)

    def _predict(
        self, video: Tensor, sound: Tensor, t: Tensor, num_texts: int, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        timestep = t.expand(num_texts)
        own = timestep if self._kept is None else timestep.unsqueeze(-1) * (1 - self._kept[:num_texts])
        made: tuple[Tensor, Tensor] = self._transformer(
            hidden_states=torch.cat([video] * num_texts).to(self._dtype),
            audio_hidden_states=torch.cat([sound] * num_texts).to(self._dtype),
            timestep=own,
            audio_timestep=timestep,
            sigma=timestep,
            **given,
        )
        return made


def _more_passes(video: _Stream, sound: _Stream, block: int, num_blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the transformer is given in a step's further passes, of a block that does not attend, then of streams
    that do not see each other; empty: there is none.

    Raises:
        RequestError: there is no such block.
    """
    perturbs = max(video.stg_scale, sound.stg_scale) > 0
    if perturbs and block >= num_blocks:
        raise RequestError(f"invalid stg_block={block}: must be at most {num_blocks - 1}, the model's last block")
    isolates = max(video.modality_scale, sound.modality_scale) > 1
    return (
        {"spatio_temporal_guidance_blocks": [block]} if perturbs else {},
        {"isolate_modalities": True} if isolates else {},
    )


def _step(video: _Stream, velocity: Tensor, t: Tensor, shape: tuple[int, ...], keep_first: bool) -> Tensor:
    """Return the tokens of the next step; those of a given first frame stay."""
    if not keep_first:
        tokens: Tensor = video.scheduler.step(velocity, t, video.tokens, return_dict=False)[0]
        return tokens
    velocity, latents = _unpack(velocity, shape), _unpack(video.tokens, shape)
    rest = video.scheduler.step(velocity[:, :, 1:], t, latents[:, :, 1:], return_dict=False)[0]
    return _pack(torch.cat([latents[:, :, :1], rest], dim=2))


def _pack(latents: Tensor) -> Tensor:
    """Return latents (1, channels, frames, height, width) as tokens (1, tokens, channels)."""
    return latents.flatten(2).transpose(1, 2)


def _unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tokens.transpose(1, 2).reshape(shape)

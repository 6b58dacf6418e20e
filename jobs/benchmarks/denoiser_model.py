"""A denoiser of random weights and the options of its speed, which are applied to it and taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from disagg_ray.config.options import DenoiserConfig
from disagg_ray.models.attention import set_attention
from disagg_ray.models.tuning import tune_transformer
from disagg_ray.models.wan.fusing import fuse_activation, fuse_rotary
from disagg_ray.models.wan.random import build_random
from disagg_ray.models.wan.shapes import Shape

State = tuple[Any, type, dict[str, Any]]
"""Of a module or an attention processor: its class, and attributes."""
TEXT_TOKENS = 512
GUIDANCE = 5.0


class Model:
    """A transformer of random weights with inputs of one size, to which options are applied and taken back."""

    def __init__(self, shape: Shape, size: Sequence[int], device: str) -> None:
        self.shape, self.config, self.device = shape, shape.transformer, device
        self.dtype = torch.bfloat16
        self.transformer = build_random(self.config, "bfloat16", device)
        (height, width, num_frames), channels, factor = size, shape.vae.z_dim, shape.vae.scale_factor_spatial
        self.latents = self.draw(1, channels, (num_frames - 1) // 4 + 1, height // factor, width // factor)
        self.texts = [self.draw(1, TEXT_TOKENS, self.config.text_dim) for _ in range(2)]
        rest = self.config.in_channels - channels
        self.condition = self.draw(1, rest, *self.latents.shape[2:]) if rest else None
        tokens = shape.image_encoder.num_tokens if shape.image_encoder else 0
        self.image = self.draw(1, tokens, self.config.image_dim) if self.config.image_dim else None
        self._plain = self._state()

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, latents: torch.Tensor | None = None, timestep: float = 700.0, text: int = 0) -> torch.Tensor:
        latents = self.latents if latents is None else latents.to(self.dtype)
        joined = latents if self.condition is None else torch.cat([latents, self.condition], dim=1)
        images = {} if self.image is None else {"encoder_hidden_states_image": self.image}
        times = torch.tensor([timestep], device=self.device)
        if self.shape.expand_timesteps:
            times = times.expand(1, latents[0, 0, :, ::2, ::2].numel())
        made: torch.Tensor = self.transformer(joined, times, self.texts[text], return_dict=False, **images)[0]
        return made

    @torch.inference_mode()
    def denoise(self, num_steps: int, *, most: int | None = None, guided: bool = False) -> torch.Tensor:
        """Run the first `most` of that many steps, by Wan's own scheduler."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shape.scheduler.flow_shift
        )
        scheduler.set_timesteps(num_steps, device=self.device)
        latents = self.latents.float()
        for timestep in scheduler.timesteps[:most]:
            made = self.forward(latents, float(timestep))
            if guided:
                other = self.forward(latents, float(timestep), 1)
                made = other + GUIDANCE * (made - other)
            latents = scheduler.step(made, timestep, latents, return_dict=False)[0]
        return latents

    def restore(self, state: Sequence[State] | None = None) -> None:
        """Take an option back, or put one that was applied before into effect again."""
        for owner, _, attributes in self._state():
            for name in attributes:
                vars(owner).pop(name, None)
        for owner, kind, attributes in state or self._plain:
            owner.__class__ = kind
            vars(owner).update(attributes)

    def apply(self, option: Callable[[Model], None]) -> list[State]:
        """Apply an option to the plain model and return its state for `restore`."""
        self.restore()
        option(self)
        return self._state()

    def _state(self) -> list[State]:
        """Return what options change, by owner: classes, calls, attention processors and their backends."""
        found = []
        for module in self.transformer.modules():
            found.append((module, type(module), {n: v for n, v in vars(module).items() if n in CHANGED}))
            if (processor := vars(module).get("processor")) is not None:
                backend = {n: v for n, v in vars(processor).items() if n == "_attention_backend"}
                found.append((processor, type(processor), backend))
        return found


CHANGED = ("forward", "processor", "fused_projections")


def tune(**options: Any) -> Callable[[Model], None]:
    """Return an option of the configuration."""

    def apply(model: Model) -> None:
        sizes = [model.latents]
        tune_transformer("denoiser", "transformer", model.transformer, DenoiserConfig(**options), sizes, TEXT_TOKENS)

    return apply


def compiled(*parts: Callable[[Any], None]) -> Callable[[Model], None]:
    """Return FlashAttention 4 with some fusing, each block compiled."""

    def apply(model: Model) -> None:
        flash(model)
        for part in parts:
            part(model.transformer)
        for block in model.transformer.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)

    return apply


def flash(model: Model) -> None:
    set_attention("", model.transformer, "flash_4" if model.device == "cuda" else "native")


def fuse_projections(transformer: Any) -> None:
    for block in transformer.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()


OPTIONS: dict[str, Callable[[Model], None]] = {
    "stock": lambda model: None,
    "flash_4": flash,
    "compile": tune(compile="default"),
    "auto, compile": tune(attention="auto", compile="default"),
    "flash_4, compile": compiled(),
    "flash_4, gelu": lambda model: (flash(model), fuse_activation(model.transformer))[0],
    "flash_4, compile, gelu": compiled(fuse_activation),
    "flash_4, compile, rotary": compiled(fuse_rotary),
    "flash_4, compile, gelu, rotary": compiled(fuse_activation, fuse_rotary),
    "flash_4, compile, gelu, rotary, qkv": compiled(fuse_activation, fuse_rotary, fuse_projections),
}
"""Each of them is applied to a plain model; `--options` picks some by name."""
FEW = ("stock", "flash_4", "compile", "auto, compile", "flash_4, compile", "flash_4, compile, gelu, rotary")

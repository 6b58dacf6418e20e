"""How fast and how small a stage runs its models: every key off by default, so that frames stay stock's bit for bit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagg_ray.text import did_you_mean

Check = tuple[str, object, bool, str]
"""Key, value, whether it may be so, and what it must be instead."""

MODES = ("default", "max-autotune-no-cudagraphs")

CACHES = ("none", "first_block", "mag", "sea", "taylorseer")

QUANTIZATIONS = ("none", "fp8_storage", "fp8")

OFFLOADS = ("none", "group", "model")

SCHEDULERS = ("unipc", "euler")

TRANSFORMERS = ("transformer", "transformer_2")

TEXT_ENCODER = "text_encoder"
"""The block that encodes prompts."""

BLEND = "blend"

PART = re.compile(r"decode\.(\d+)of(\d+)")
"""Of the block `decode`: some of the tiles of a tiled decode, of which `blend` makes the video."""

TILES = "tiles_"
"""What the names of their outputs begin with; a number from 1 follows."""


@dataclass(frozen=True)
class StepCacheConfig:
    """Steps that reuse what the step before computed: diffusers' step caches, each beside its own measure.

    Diffusers' PAB and FasterCache are not among them: both mix up the guided and the unguided pass, which Wan runs
    one after the other.
    """

    method: str = "none"
    """none, first_block (FirstBlockCache), mag (MagCache), sea (SeaCache, text-to-video only) or taylorseer (of the
    model's output)."""
    threshold: float | None = None
    """first_block, mag, sea: the change below which a step is skipped; null: diffusers' 0.05, 0.06 and 0.25."""
    interval: int | None = None
    """taylorseer: steps predicted after each that is computed; null: diffusers' 5."""
    ratios: list[float] = field(default_factory=list)
    """mag: the model's magnitude ratios, one a step of its calibration (`MagCacheConfig(calibrate=True)`)."""


@dataclass(frozen=True)
class LoraConfig:
    path: str = "???"
    """A .safetensors file on each of the stage's nodes, in diffusers' format or one that diffusers converts."""
    strength: float = 1.0
    """By how much it counts; 0 is as good as none."""
    transformer: str = "transformer"
    """Which one it belongs to: transformer (Wan 2.2: high noise) or transformer_2 (low noise)."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Of the stage's transformers."""

    attention: str | None = None
    """A diffusers attention backend (native, _native_cudnn, flash, sage, ...), flash_4 (the package flash-attn-4, extra
    flash4), auto (the fastest exact one here, measured at start at the sizes of warm_up), or null: what torch picks."""
    compile: str | None = None
    """torch.compile's mode for the repeated blocks: default or max-autotune-no-cudagraphs; null: eager."""
    step_cache: StepCacheConfig = field(default_factory=StepCacheConfig)
    """Skips work from step to step."""
    quantization: str = "none"
    """none, fp8_storage (weights kept in 8 bits, computed in the stage's dtype) or fp8 (matrix products in 8 bits;
    needs torchao)."""
    loras: list[LoraConfig] = field(default_factory=list)
    """Files that change the weights."""


@dataclass(frozen=True)
class VaeConfig:
    """Of the stage's VAE."""

    channels_last: bool = False
    """Lay kernels out as tensor cores like them; activations follow."""
    compile: bool = False
    """Fuse each norm with its activation in one kernel."""
    autotune: bool = False
    """Let cuDNN time its convolutions at each new size (`torch.backends.cudnn.benchmark`, for the whole process). For
    stages on a GPU only."""
    tile_pixels: int | None = None
    """Height x width from which it works in overlapping tiles, in less memory; null: never. A decode in parts always
    does."""


def parse_part(block: str) -> tuple[int, int] | None:
    """Return which of how many parts of a decode a block is, counted from 1; None: it is none."""
    found = PART.fullmatch(block)
    return (int(found[1]), int(found[2])) if found else None


def name_parts(num_parts: int) -> list[str]:
    """Return the blocks of a decode in so many parts."""
    return [f"decode.{number}of{num_parts}" for number in range(1, num_parts + 1)]


def tile_tensors(num_parts: int) -> tuple[str, ...]:
    """Return the names of what the parts of a decode make."""
    return tuple(f"{TILES}{number}" for number in range(1, num_parts + 1))


def one_of(key: str, value: str | None, words: Sequence[str], *, null: bool = False) -> Check:
    """Return the check of a key that takes one of some words; `null`: or none."""
    remedy = f"must be one of {', '.join(words)}{' or null' if null else ''}"
    ok = value in words or (null and value is None)
    return key, value, ok, remedy + did_you_mean(value or "", words)

"""How fast and how small a stage runs its models: all keys are off by default, so frames are those of diffusers."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from disagg_ray.config.rules import Check, Count, Positive, Rule, Section, at_least, one_of

TRANSFORMERS = ("transformer", "transformer_2")

TEXT_ENCODER = "text_encoder"
"""The block that encodes prompts."""

BLEND = "blend"
"""The block that makes the video of the tiles that the parts of a decode made."""

PART = re.compile(r"decode\.(\d+)of(\d+)")
"""A part of the block `decode`: some of the tiles of a tiled decode."""

TILES = "tiles_"
"""What the names of their outputs begin with; a number from 1 follows."""


Dtype = Annotated[str, one_of("float32", "bfloat16", "float16")]


@dataclass(frozen=True)
class StepCacheConfig(Section):
    """Diffusers' step caches: skip denoiser work by reusing what the step before computed. Changes the frames.

    PAB and FasterCache are not offered: both mix up the guided and the unguided pass, which run one after the other.
    """

    method: Annotated[str, one_of("none", "first_block", "mag", "sea", "taylorseer")] = "none"
    """none, first_block (FirstBlockCache), mag (MagCache), sea (SeaCache, model.task t2v only) or taylorseer (of the
    model's output)."""
    threshold: Annotated[float, at_least(0)] | None = None
    """For first_block, mag and sea: the change of a step's input below which its work is skipped. Higher is faster and
    less exact. null: diffusers' default (0.05, 0.06 and 0.25)."""
    interval: Count | None = None
    """For taylorseer: steps that are predicted after each computed one. Higher is faster and less exact. null:
    diffusers' default (5)."""
    ratios: list[Positive] = field(default_factory=list)
    """For mag: the model's magnitude ratios, one for each step of its calibration
    (`MagCacheConfig(calibrate=True)`)."""

    def rules(self) -> Iterator[Check]:
        ok = self.threshold is None or self.method in ("first_block", "mag", "sea")
        yield "threshold", self.threshold, ok, "must be left out: it is for first_block, mag or sea"
        ok = self.interval is None or self.method == "taylorseer"
        yield "interval", self.interval, ok, "must be left out: it is for taylorseer"
        ok = bool(self.ratios) == (self.method == "mag")
        yield "ratios", self.ratios, ok, "must be the model's positive ratios for mag, and [] for any other method"


@dataclass(frozen=True)
class LoraConfig(Section):
    """A LoRA, merged into the weights when the stage loads."""

    path: Annotated[str, Rule(lambda path: path.endswith(".safetensors"), "must be a .safetensors file")] = "???"
    """A .safetensors file, present on every node of the stage, in diffusers' format or one that diffusers converts."""
    strength: Annotated[float, Rule(math.isfinite, "must be a finite number")] = 1.0
    """Factor of its weights; 0 turns it off."""
    transformer: Annotated[str, one_of(*TRANSFORMERS)] = "transformer"
    """The transformer it changes: transformer (of two, that for high noise) or transformer_2 (for low noise)."""


@dataclass(frozen=True)
class DenoiserConfig(Section):
    """How the stage's transformers run."""

    attention: str | None = None
    """Attention backend of diffusers (native, _native_cudnn, flash, sage, ...), or flash_4 (needs flash-attn-4, the
    extra flash4); auto: the fastest exact one here, timed at start at the sizes of warm_up, or else at the default
    size, and of several ranks by the first; null: torch's choice."""
    compile: Annotated[str, one_of("default", "max-autotune-no-cudagraphs")] | None = None
    """torch.compile mode of the repeated blocks: default or max-autotune-no-cudagraphs. Costs minutes at the first
    request of each size (see warm_up). null: eager."""
    fuse: bool = False
    """Fewer passes over activations: GELU within its matrix product, rotary embedding in one pass. Changes the frames
    by rounding."""
    step_cache: StepCacheConfig = field(default_factory=StepCacheConfig)
    """Skips work from step to step."""
    quantization: Annotated[str, one_of("none", "fp8_storage", "fp8")] = "none"
    """none, fp8_storage (weights held in 8 bits, computed in the stage's dtype: half the VRAM) or fp8 (matrix products
    in 8 bits: faster; needs torchao). Both change the frames."""
    loras: list[LoraConfig] = field(default_factory=list)
    """LoRAs, in the order in which they are merged."""

    def rules(self) -> Iterator[Check]:
        ok = self.quantization != "fp8" or not self.loras
        yield "quantization", self.quantization, ok, "goes with neither offload nor loras; write fp8_storage"
        ok = self.quantization != "fp8_storage" or self.compile is None
        yield "quantization", self.quantization, ok, "cannot be compiled; write compile: null, or fp8"


@dataclass(frozen=True)
class VaeConfig(Section):
    """How the stage's VAE runs."""

    dtype: Dtype | None = None
    """Precision of the VAE in this stage; null: the stage's dtype, or else model.dtype.vae."""
    channels_last: bool = False
    """Use the memory layout that tensor cores prefer for kernels and activations. Changes the frames by rounding."""
    compile: bool = False
    """Fuse each norm and its activation into one kernel (torch.compile)."""
    autotune: bool = False
    """Let cuDNN time its convolutions at each new size (`torch.backends.cudnn.benchmark`, for the whole process). For
    stages on a GPU only."""
    tile_pixels: Annotated[int, at_least(0)] | None = None
    """Height x width from which it works in overlapping tiles, which takes less VRAM, more time, and changes the
    frames; null: never. A decode in parts always does."""


def parse_part(block: str) -> tuple[int, int] | None:
    """Return which part of how many of a decode a block is, counted from 1; None: it is not a part."""
    found = PART.fullmatch(block)
    return (int(found[1]), int(found[2])) if found else None


def name_parts(num_parts: int) -> list[str]:
    """Return the blocks of a decode in `num_parts` parts."""
    return [f"decode.{number}of{num_parts}" for number in range(1, num_parts + 1)]


def tile_tensors(num_parts: int) -> tuple[str, ...]:
    """Return the names of the outputs of a decode's parts."""
    return tuple(f"{TILES}{number}" for number in range(1, num_parts + 1))

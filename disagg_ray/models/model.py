"""What runs a family: its blocks, and what of it our options change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from disagg_ray.models.blocks import Stepping
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.geometry import Geometry


class Model(ABC):
    """A family's blocks and their ways.

    Blocks are named `block` or `block.part`: all before `denoise`, `denoise`, then `decode` and what follows. Each
    reads and writes a pipeline's state, whose tensors travel where a stage ends between two of them.
    """

    @abstractmethod
    def blocks(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], Stepping]:
        """Return the leaf blocks of a checkpoint's task in order, and the one of them, or inside one, that steps."""

    def part_blocks(self, names: Sequence[str], num_parts: int, folder: Path) -> dict[str, Any]:
        """Return those of the names that share out one tiled decode in `num_parts` parts."""
        return {}

    def constants(self, geometry: Geometry) -> Mapping[str, int]:
        """Return what the blocks' pipeline computes of other components' configurations, by its property."""
        return {}

    def adapt(self, transformer: Any) -> None:  # noqa: B027 - some families need nothing
        """Change a loaded and tuned transformer so that the blocks can call it."""

    def fuse(self, transformer: Any) -> bool:
        """Have a transformer make fewer passes over activations; return whether there is a way to."""
        return False

    def convert_lora(self, transformer: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a LoRA's tensors as the stock pipeline hands them to a transformer."""
        raise NotImplementedError

    lora_extras: tuple[str, ...] = ()
    """Modules whose LoRA stock leaves out where a transformer lacks them."""
    norms: tuple[type[Any], ...] = ()
    """Root-mean-square norms over the channels of its VAE."""

"""One checksum for all pools: torch integer operations, the same on CPU and CUDA."""

from __future__ import annotations

import torch

NAME = "weighted-int64-1"
"""Definition: sum over 8-byte little-endian words w_i of (w_i xor 0x5bd1e995_9e3779b9) * (2 i + 1), modulo 2^64.

Odd weights make any change of a single word visible, growing ones make any swap of two different words visible.
"""

_MASK = 0x5BD1E9959E3779B9
_CHUNK_WORDS = 1 << 19  # temporaries of 4 MiB stay in cache


def checksum(data: torch.Tensor) -> int:
    """Return the checksum of bytes, uint8 of a length that is a multiple of 8."""
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    odd = torch.arange(1, 2 * min(_CHUNK_WORDS, len(words)) + 1, 2, dtype=torch.int64, device=data.device)
    for start in range(0, len(words), _CHUNK_WORDS):
        masked = words[start : start + _CHUNK_WORDS] ^ _MASK
        total += (masked * odd[: len(masked)]).sum() + masked.sum() * (2 * start)
    return int(total)

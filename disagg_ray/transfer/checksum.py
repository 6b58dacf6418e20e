"""One checksum for all pools: torch integer operations, the same on CPU and CUDA."""

from __future__ import annotations

import torch

NAME = "mixed-int64-1"
"""Definition, over 8-byte little-endian words w_i and modulo 2^64: m_i = w_i xor 0x5bd1e995_9e3779b9, the sum of
(m_i xor (m_i >> 29)) * (2 i + 1), read as a signed number.

Mixing is one to one and weights are odd, so any change of a single word is visible. Weights grow, so a swap of two
words is, but for a few of their 2^64 differences. Without the shift, changes of the highest bit (the sign of a float)
in two words would cancel.
"""

_MASK = 0x5BD1E9959E3779B9
_SHIFT = 29
_LOW = (1 << (64 - _SHIFT)) - 1  # torch shifts the sign in; this takes it out again
_CHUNK_WORDS = 1 << 17  # temporaries of 1 MiB stay in cache
_CUDA_CHUNK_WORDS = 1 << 21  # a kernel costs microseconds, however little it does


def checksum(data: torch.Tensor) -> int:
    """Return the checksum of bytes, uint8 of a length that is a multiple of 8."""
    words = data.view(torch.int64)
    size = _CUDA_CHUNK_WORDS if data.is_cuda else _CHUNK_WORDS
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    odd = torch.arange(1, 2 * min(size, len(words)) + 1, 2, dtype=torch.int64, device=data.device)
    for start in range(0, len(words), size):
        mixed = words[start : start + size] ^ _MASK
        mixed ^= (mixed >> _SHIFT) & _LOW
        total += (mixed * odd[: len(mixed)]).sum() + mixed.sum() * (2 * start)
    return int(total)

"""One checksum for all pools: torch integer operations, the same on CPU and CUDA."""

from __future__ import annotations

import torch

NAME = "rows-columns-int64-1"
"""Definition: lay the 8-byte little-endian words out in rows of 1024, the last one short, and take the sums of the rows
and of the columns, modulo 2^64. Mix each as SplitMix64 does its i-th state, mix(s_i + i * 0x9e3779b97f4a7c15). The sum
of the mixed rows plus the number of words is the upper half of 128 bits, that of the mixed columns the lower.

Two passes of plain additions are nearly all it costs. Mixing is one to one, so a single changed word always shows.
Source of the mixing: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
"""

_ROW = 1024
_CHUNK_ROWS = 128  # on a CPU: 1 MiB stays in cache from the first pass to the second
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
_MODULUS = 1 << 64


def checksum(data: torch.Tensor) -> int:
    """Return the checksum of bytes, uint8 of a length that is a multiple of 8."""
    words = data.view(torch.int64)
    whole = len(words) // _ROW * _ROW
    table, tail = words[:whole].view(-1, _ROW), words[whole:]
    chunks = [table] if data.is_cuda else torch.split(table, _CHUNK_ROWS)
    rows = torch.cat([chunk.sum(1) for chunk in chunks] + [tail.sum().view(1)])
    columns = torch.stack([chunk.sum(0) for chunk in chunks]).sum(0)
    columns[: len(tail)] += tail
    mixed = _mix(torch.cat([rows, columns]).cpu())  # a few thousand numbers: kernels would cost more than they do
    halves: list[int] = torch.stack([mixed[: len(rows)].sum(), mixed[len(rows) :].sum()]).tolist()
    upper, lower = halves
    return (upper + len(words)) % _MODULUS << 64 | lower % _MODULUS


def _mix(sums: torch.Tensor) -> torch.Tensor:
    mixed = sums + torch.arange(len(sums), dtype=torch.int64) * _GOLDEN
    for shift, factor in _ROUNDS:
        low = (1 << (64 - shift)) - 1  # torch shifts the sign in; this takes it out again
        mixed = (mixed ^ ((mixed >> shift) & low)) * factor
    return mixed

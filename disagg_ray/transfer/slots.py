"""The place of each slot in a pool: first fit over a sorted free list, coalesced on free."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; enough for any dtype and for CUDA's vectorised copies."""

HEADER_BYTES = ALIGNMENT
"""Before each slot's data: a nonce, new at each publish."""


@dataclass(frozen=True)
class Span:
    offset: int
    nbytes: int


class SlotAllocator:
    """Hands out aligned spans of `capacity` bytes; spans never overlap and may be freed in any order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.bytes_in_use = 0
        self._free = [Span(0, self.capacity)] if self.capacity else []

    def allocate(self, nbytes: int, *, at_end: bool = False) -> Span | None:
        """Return a span of at least `nbytes`, the first or the last there is, or None when no gap is large enough."""
        size = align(nbytes)
        indices = range(len(self._free))
        for index in reversed(indices) if at_end else indices:
            gap = self._free[index]
            left = gap.nbytes - size
            if left >= 0:
                rest = Span(gap.offset if at_end else gap.offset + size, left)
                self._free[index : index + 1] = [rest] if left else []
                self.bytes_in_use += size
                return Span(gap.offset + left if at_end else gap.offset, size)
        return None

    def free(self, span: Span) -> None:
        index = bisect_left(self._free, span.offset, key=lambda gap: gap.offset)
        start, end = span.offset, span.offset + span.nbytes
        if index < len(self._free) and self._free[index].offset == end:
            end += self._free.pop(index).nbytes
        if index > 0 and self._free[index - 1].offset + self._free[index - 1].nbytes == start:
            index -= 1
            start = self._free.pop(index).offset
        self._free.insert(index, Span(start, end - start))
        self.bytes_in_use -= span.nbytes

    @property
    def num_gaps(self) -> int:
        return len(self._free)


def align(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


def slot_bytes(nbytes: int) -> int:
    """Return what a tensor of `nbytes` takes of a pool, header and alignment included."""
    return HEADER_BYTES + align(nbytes)

"""Tensors that are kept in a pool's spare room for the next request with the same content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from disagg_ray.transfer.memory import PoolMemory
from disagg_ray.transfer.slots import SlotAllocator, Span, slot_bytes


@dataclass(frozen=True)
class _Entry:
    span: Span
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int


class TensorCache:
    """At most `max_bytes` of a pool's memory; the least recently used tensors go first.

    Kept at the far end of the pool and evicted when slots need the room: nothing waits for it longer than one copy.
    Thread-safe, under the pool's lock. An entry that is being copied is taken out meanwhile, so it cannot be evicted.
    """

    def __init__(
        self,
        memory: PoolMemory,
        allocator: SlotAllocator,
        changed: threading.Condition,
        max_bytes: int,
    ) -> None:
        self.bytes_kept = 0
        self.hits = 0
        self.misses = 0
        self._memory = memory
        self._allocator = allocator
        self._changed = changed
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What is kept, least recently used first."""
        return tuple(self._entries)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """Return a copy of the tensor that was put under a key, or None if it is not there."""
        with self._changed:
            entry = self._entries.pop(key, None)
            self.hits += entry is not None
            self.misses += entry is None
        if entry is None:
            return None
        found = self._memory.data.new_empty(entry.nbytes)  # the caller's, of the caller's stream
        with self._copying(key, entry) as kept:
            found.copy_(kept)
        return found.view(entry.dtype).view(entry.shape)

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a copy of a tensor if there is room for it once others that are kept have gone."""
        tensor = tensor.detach().contiguous()
        with self._changed:
            span = None if key in self._entries else self._make_room(tensor.nbytes)
        if span is not None:
            with self._copying(key, _Entry(span, tensor.shape, tensor.dtype, tensor.nbytes)) as kept:
                kept.copy_(tensor.view(-1).view(torch.uint8))

    def evict(self) -> bool:
        """Free the room of the least recently used tensor; False: none is left. The caller holds the pool's lock."""
        if not self._entries:
            return False
        _, entry = self._entries.popitem(last=False)
        self._free(entry)
        return True

    def _make_room(self, nbytes: int) -> Span | None:
        size = slot_bytes(nbytes)  # so that a slot of the same tensor fits where one gave way
        if size > self._max_bytes:
            return None
        while self.bytes_kept + size > self._max_bytes or not (span := self._allocator.allocate(size, at_end=True)):
            if not self.evict():
                return None
        self.bytes_kept += size
        return span

    @contextmanager
    def _copying(self, key: Hashable, entry: _Entry) -> Iterator[torch.Tensor]:
        """Give an entry's bytes; afterwards it is the most recently used, or freed if the copy failed."""
        copied = False
        try:
            with self._memory.own_stream(after_caller=True):
                yield self._memory.data[entry.span.offset :][: entry.nbytes]
            copied = True
        finally:
            with self._changed:
                if copied and key not in self._entries:
                    self._entries[key] = entry
                else:
                    self._free(entry)
                self._changed.notify_all()  # a reservation may have found it out of reach

    def _free(self, entry: _Entry) -> None:
        self._allocator.free(entry.span)
        self.bytes_kept -= entry.span.nbytes

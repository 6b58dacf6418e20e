"""Queues whose items can be moved and taken out anywhere, in O(log length)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

OLDEST_EVERY = 8
"""Every so many turns of a queue the oldest item has its turn, whatever its priority."""

T = TypeVar("T", bound=Hashable)


class Heap(Generic[T]):
    """Items by key, the least first and equals in order; pushing one again moves it.

    Keys are numbers, of one length in one heap. Items differ by hash and `==`.
    """

    def __init__(self) -> None:
        self._entries: dict[T, tuple[Any, ...]] = {}
        """By item: its key, a serial number and itself."""
        self._heap: list[tuple[Any, ...]] = []
        """The entries, and stale ones that are dropped when they come up."""
        self._serial = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, item: T, *key: float) -> None:
        entry = self._entries[item] = (*key, next(self._serial), item)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def remove(self, item: T) -> bool:
        """Take an item out; return whether it was in."""
        return self._entries.pop(item, None) is not None

    def peek(self) -> T | None:
        while self._heap and self._entries.get(self._heap[0][-1]) is not self._heap[0]:
            heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def least(self) -> float:
        """Return the first number of the key of what `peek` gives."""
        return float(self._heap[0][0])


class PriorityQueue(Generic[T]):
    """Items by priority, highest first, and by sequence within it; nothing starves (`OLDEST_EVERY`).

    Each call costs O(log length).
    """

    def __init__(self) -> None:
        self._by_priority: Heap[T] = Heap()
        self._by_age: Heap[T] = Heap()
        self._num_popped = 0

    def __len__(self) -> int:
        return len(self._by_age)

    def push(self, item: T, priority: int, sequence: int) -> None:
        """Put an item in its order; one that is in already moves."""
        self._by_priority.push(item, -priority, sequence)
        self._by_age.push(item, sequence)

    def pop(self) -> T:
        """Take out whose turn it is.

        Raises:
            IndexError: the queue is empty.
        """
        self._num_popped += 1
        item = (self._by_priority if self._num_popped % OLDEST_EVERY else self._by_age).peek()
        if item is None:
            raise IndexError("the queue is empty")
        self.remove(item)
        return item

    def remove(self, item: T) -> bool:
        """Take an item out, wherever it stands; return whether it was in."""
        return self._by_priority.remove(item) and self._by_age.remove(item)

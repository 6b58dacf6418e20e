"""Queues whose items can be moved and taken out anywhere, in O(log length)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

OLDEST_EVERY = 8
"""Every so many turns of a queue the oldest item has its turn, whatever its priority."""
PRIORITY_OF_TWICE = 10
"""An owner whose next item has this much more priority than another's may have twice as much in hand."""

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

    def find(self, accepts: Callable[[T], bool]) -> tuple[float, T] | None:
        """Return the first item that is accepted, and the first number of its key; each one before it costs a pop."""
        passed: list[tuple[Any, ...]] = []
        try:
            while (item := self.peek()) is not None:
                if accepts(item):
                    return self.least(), item
                passed.append(heappop(self._heap))
            return None
        finally:
            for entry in passed:
                heappush(self._heap, entry)


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

    def highest(self) -> int:
        """Return the highest priority there is; the queue must not be empty."""
        self._by_priority.peek()
        return -int(self._by_priority.least())

    def remove(self, item: T) -> bool:
        """Take an item out, wherever it stands; return whether it was in."""
        return self._by_priority.remove(item) and self._by_age.remove(item)


@dataclass
class _Account:
    """What an owner has in hand."""

    seconds: float = 0.0
    num_items: int = 0
    served: int = -1
    """When it had its last turn."""


class FairQueue(Generic[T]):
    """Items of several owners, each with a `PriorityQueue`: the next is of the owner with the least in hand.

    In hand are predicted seconds, divided by the owner's weight; while none are known, items; of equals, whoever has
    waited longest for a turn. Who has nothing in hand comes first, so nobody starves. A call costs O(owners + log
    length).
    """

    def __init__(self) -> None:
        self._queues: dict[str, PriorityQueue[T]] = {}
        """Of owners with something in the queue."""
        self._accounts: dict[str, _Account] = {}
        """Of owners with something in the queue or in hand."""
        self._owners: dict[T, str] = {}
        self._turns = itertools.count()

    def __len__(self) -> int:
        return len(self._owners)

    def push(self, item: T, owner: str, priority: int, sequence: int) -> None:
        """Put in an item that is not in."""
        self._queues.setdefault(owner, PriorityQueue()).push(item, priority, sequence)
        self._owners[item] = owner

    def pop(self) -> T:
        """Take out whose turn it is; `charge` its owner for it.

        Raises:
            IndexError: the queue is empty.
        """
        owner = min(self._queues, key=self._in_hand, default=None)
        if owner is None:
            raise IndexError("the queue is empty")
        item = self._queues[owner].pop()
        self._forget(item)
        return item

    def remove(self, item: T) -> bool:
        """Take an item out, wherever it stands; return whether it was in."""
        owner = self._owners.get(item)
        if owner is None:
            return False
        self._queues[owner].remove(item)
        self._forget(item)
        return True

    def charge(self, owner: str, seconds: float) -> None:
        """Note that an owner has something more in hand."""
        account = self._accounts.setdefault(owner, _Account())
        account.seconds += seconds
        account.num_items += 1
        account.served = next(self._turns)

    def credit(self, owner: str, seconds: float) -> None:
        """Note that an owner is done with what it was charged for."""
        account = self._accounts[owner]
        account.num_items -= 1
        account.seconds = account.seconds - seconds if account.num_items else 0.0  # no rounding error stays
        self._tidy(owner)

    def _in_hand(self, owner: str) -> tuple[float, float, int]:
        account = self._accounts.get(owner, _Account())
        weight = 2.0 ** (self._queues[owner].highest() / PRIORITY_OF_TWICE)
        return account.seconds / weight, account.num_items / weight, account.served

    def _forget(self, item: T) -> None:
        owner = self._owners.pop(item)
        if not self._queues[owner]:
            del self._queues[owner]
            self._tidy(owner)

    def _tidy(self, owner: str) -> None:
        if owner not in self._queues and owner in self._accounts and not self._accounts[owner].num_items:
            del self._accounts[owner]

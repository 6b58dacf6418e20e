"""Queues of the few hundred items that may wait: plain dicts, looked through at each turn.

`PriorityQueue` gives the item with the highest priority first, and of equals the one admitted first; every
`OLDEST_EVERY`-th turn is the oldest item's whatever its priority, so that none starves. `FairQueue` has a
`PriorityQueue` for each owner, and gives the next item of the owner with the least outstanding: predicted seconds,
or items while no seconds are known, divided by a weight that doubles with each `PRIORITY_OF_TWICE` of priority of the
owner's best item; of equals, of the owner that was served longest ago. An owner with nothing outstanding comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

OLDEST_EVERY = 8
"""Turns of a queue of which one is the oldest item's."""
PRIORITY_OF_TWICE = 10
"""Difference in priority with which an owner may have twice as much outstanding as another."""

T = TypeVar("T", bound=Hashable)


class PriorityQueue(Generic[T]):
    """Items by priority, highest first, and by sequence within it; every `OLDEST_EVERY`-th is the oldest."""

    def __init__(self) -> None:
        self._keys: dict[T, tuple[int, int]] = {}
        """Negative priority and sequence of each item."""
        self._num_popped = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[T]:
        return iter(self._keys)

    def push(self, item: T, priority: int, sequence: int) -> None:
        """Put an item in its order; one that is in already moves."""
        self._keys[item] = -priority, sequence

    def pop(self) -> T:
        """Take out the next item.

        Raises:
            ValueError: the queue is empty.
        """
        self._num_popped += 1
        if self._num_popped % OLDEST_EVERY:
            item = min(self._keys, key=self._keys.__getitem__)
        else:
            item = min(self._keys, key=lambda item: self._keys[item][1])
        del self._keys[item]
        return item

    def highest(self) -> int:
        """Return the highest priority in the queue, which must not be empty."""
        return -min(self._keys.values())[0]

    def remove(self, item: T) -> bool:
        """Take an item out; return whether it was in."""
        return self._keys.pop(item, None) is not None


@dataclass
class Owner(Generic[T]):
    """What an owner has in the queue and outstanding."""

    queue: PriorityQueue[T] = field(default_factory=PriorityQueue)
    seconds: float = 0.0
    """Outstanding, predicted."""
    num_items: int = 0
    """Outstanding."""
    last_turn: int = -1
    """Number of the turn in which it was served last."""

    def load(self) -> tuple[float, float, int]:
        """Return what owners are served by, the least first."""
        weight = 2.0 ** (self.queue.highest() / PRIORITY_OF_TWICE)
        return self.seconds / weight, self.num_items / weight, self.last_turn


class FairQueue(Generic[T]):
    """Items of several owners: the next is of the owner with the least outstanding."""

    def __init__(self) -> None:
        self.owners: dict[str, Owner[T]] = {}
        """Those with something in the queue or outstanding."""
        self._turns = itertools.count()

    def __len__(self) -> int:
        return sum(len(owner.queue) for owner in self.owners.values())

    def push(self, item: T, owner: str, priority: int, sequence: int) -> None:
        """Put in an item that is not in."""
        self.owners.setdefault(owner, Owner()).queue.push(item, priority, sequence)

    def pop(self) -> T:
        """Take out the next item; `charge` its owner for it.

        Raises:
            ValueError: the queue is empty.
        """
        name = min((name for name, owner in self.owners.items() if owner.queue), key=lambda n: self.owners[n].load())
        item = self.owners[name].queue.pop()
        self._drop_done(name)
        return item

    def remove(self, item: T) -> bool:
        """Take an item out; return whether it was in."""
        for name, owner in self.owners.items():
            if owner.queue.remove(item):
                self._drop_done(name)
                return True
        return False

    def charge(self, owner: str, seconds: float) -> None:
        """Add an item of this many predicted seconds to what an owner has outstanding."""
        account = self.owners.setdefault(owner, Owner())
        account.seconds += seconds
        account.num_items += 1
        account.last_turn = next(self._turns)

    def credit(self, owner: str, seconds: float) -> None:
        """Take off what an owner was charged for one item."""
        account = self.owners[owner]
        account.num_items -= 1
        account.seconds = account.seconds - seconds if account.num_items else 0.0  # no rounding error stays
        self._drop_done(owner)

    def _drop_done(self, name: str) -> None:
        owner = self.owners[name]
        if not owner.queue and not owner.num_items:
            del self.owners[name]

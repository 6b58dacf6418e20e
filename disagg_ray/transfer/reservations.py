"""Which attempt owns which slot of a pool, and when its bytes are free again.

A slot belongs to the (request, attempt) it was reserved for. Releasing that key frees its slots at once, is
idempotent, and wins over a late finish: the key is never served again. Slots that are being copied to are freed when
that ends. The destination of a pull that ran out of time is quarantined until the peer is known to be dead. What no
slot takes may hold tensors that are kept for later requests: see `transfer.cache`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from disagg_ray.errors import Cancelled, PoolError
from disagg_ray.transfer.cache import TensorCache
from disagg_ray.transfer.handoff import AttemptKey
from disagg_ray.transfer.memory import PoolMemory
from disagg_ray.transfer.recent import Recent
from disagg_ray.transfer.slots import SlotAllocator, Span, slot_bytes

REMEMBERED_KEYS = 100_000
"""Released keys that are remembered, so that a late finish of one is refused."""
REMEMBERED_DEAD = 1_000
"""Dead sessions that are remembered, so that what a read of one leaves behind is freed when it ends."""


class Reservations:
    """The slots of a pool. Thread-safe; `reserve` waits its turn, in call order, and nothing else waits."""

    def __init__(self, name: str, memory: PoolMemory, cache_bytes: int) -> None:
        self.name = name
        self._allocator = SlotAllocator(len(memory.data))
        self._changed = threading.Condition()
        self.cache = TensorCache(memory, self._allocator, self._changed, cache_bytes)
        self.slots: dict[AttemptKey, dict[str, Span]] = {}
        """By owner and name."""
        self._waiting: deque[object] = deque()
        self._copies: Counter[AttemptKey] = Counter()
        """Copies under way to slots of each key."""
        self._released_meanwhile: defaultdict[AttemptKey, list[Span]] = defaultdict(list)
        """Slots to be freed when those end."""
        self._quarantine: list[tuple[str, Span]] = []
        """With the session whose late bytes may still arrive there."""
        self._dead: Recent[str] = Recent(REMEMBERED_DEAD)
        self._released: Recent[AttemptKey] = Recent(REMEMBERED_KEYS)
        self._closed = False

    @property
    def capacity(self) -> int:
        return self._allocator.capacity

    @property
    def bytes_in_use(self) -> int:
        """Bytes that slots take; what the cache keeps is as good as free."""
        with self._changed:
            return self._allocator.bytes_in_use - self.cache.bytes_kept

    @property
    def bytes_quarantined(self) -> int:
        with self._changed:
            return sum(span.nbytes for _, span in self._quarantine)

    @property
    def num_waiting(self) -> int:
        """Calls of `reserve` that wait for room."""
        return len(self._waiting)

    def reserve(self, key: AttemptKey, sizes: Mapping[str, int], timeout_s: float | None = None) -> None:
        """Set room aside for tensors of at most these bytes, all or none; wait while the pool is full.

        Calls are served in order, and what is cached is evicted before they wait. The wait ends when others release,
        when `key` is released, or at `timeout_s`.

        Raises:
            PoolError: the pool could never hold them, is closed, had no room by `timeout_s`, or holds one already.
            Cancelled: `key` was released.
        """
        needed = sum(slot_bytes(size) for size in sizes.values())
        if needed > self.capacity:
            raise PoolError(
                f"{self.name}: {needed} bytes are needed at once and the pool holds {self.capacity}; "
                f"raise transport.pool_bytes or lower limits"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not (self._waiting[0] is ticket and self._try_reserve(key, sizes)):
                    self._check_open(key)
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise PoolError(f"{self.name}: no room for {needed} bytes within {timeout_s} s")
                    self._changed.wait(left)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def can_hold(self, sizes: Mapping[str, int]) -> bool:
        """Return whether tensors of these bytes would fit if every slot was released, what is quarantined apart."""
        return sum(map(slot_bytes, sizes.values())) <= self.capacity - self.bytes_quarantined

    def _try_reserve(self, key: AttemptKey, sizes: Mapping[str, int]) -> bool:
        self._check_open(key)
        twice = self.slots.get(key, {}).keys() & sizes.keys()
        if twice:
            raise PoolError(f"{self.name}: room for {', '.join(sorted(twice))} was reserved before")
        if sum(map(slot_bytes, sizes.values())) > self.capacity - self.bytes_in_use:
            return False  # an empty cache would not help
        spans: dict[str, Span] = {}
        for name, size in sizes.items():
            while (span := self._allocator.allocate(slot_bytes(size))) is None and self.cache.evict():
                pass
            if span is None:
                for taken in spans.values():
                    self._allocator.free(taken)
                return False
            spans[name] = span
        self.slots.setdefault(key, {}).update(spans)
        return True

    def is_released(self, key: AttemptKey) -> bool:
        return key in self._released

    def release(self, key: AttemptKey, names: Iterable[str] | None = None) -> None:
        """Free the key's slots, or only the named ones. Without names the key is never served again."""
        with self._changed:
            slots = self.slots.get(key, {})
            spans = [slots.pop(name) for name in list(slots if names is None else names) if name in slots]
            if self._copies[key]:
                self._released_meanwhile[key] += spans
            else:
                self._free(spans)
            if names is None:
                self.slots.pop(key, None)
                self._released.add(key)
            self._changed.notify_all()

    def give_up(self, key: AttemptKey) -> None:
        """Release a key that has no slots yet, which ends its wait; one that has is left alone."""
        with self._changed:
            if key not in self.slots:
                self.release(key)

    def free_quarantine(self, session: str) -> None:
        """Free what is quarantined, now or by a read that still runs, for a session whose process is dead."""
        with self._changed:
            self._dead.add(session)
            freed = [span for name, span in self._quarantine if name == session]
            self._quarantine = [(name, span) for name, span in self._quarantine if name != session]
            self._free(freed)

    def note_alive(self, session: str) -> None:
        """Note that a session's name has been taken by a living process."""
        with self._changed:
            self._dead.discard(session)

    def quarantine(self, key: AttemptKey, spans: Sequence[Span], session: str) -> None:
        """Keep the destination of a timed-out read from being handed out again."""
        with self._changed:
            slots, released = self.slots.get(key, {}), self._released_meanwhile[key]
            for name in [name for name, span in slots.items() if span in spans]:
                del slots[name]
            released[:] = [span for span in released if span not in spans]
            if session in self._dead:
                self._free(spans)
            else:
                self._quarantine += [(session, span) for span in spans]

    def close_waits(self) -> None:
        """End every wait; nothing is reserved or looked up any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def span(self, key: AttemptKey, name: str, nbytes: int) -> Span:
        """Return the slot that was reserved for a tensor of these bytes.

        Raises:
            PoolError: no such slot, or it is too small.
            Cancelled: `key` was released.
        """
        with self._changed:
            self._check_open(key)
            span = self.slots.get(key, {}).get(name)
        if span is None:
            raise PoolError(f"{self.name}: no room was reserved for {name}")
        if slot_bytes(nbytes) > span.nbytes:
            raise PoolError(f"{self.name}: {name} has {nbytes} bytes, more than was reserved for it")
        return span

    @contextmanager
    def copying(self, key: AttemptKey) -> Iterator[None]:
        """Hold back the freeing of a key's slots while they are written to.

        Raises:
            Cancelled: `key` was released before or meanwhile.
            PoolError: the pool is closed.
        """
        with self._changed:
            self._check_open(key)
            self._copies[key] += 1
        try:
            yield
        finally:
            with self._changed:
                self._copies[key] -= 1
                if not self._copies[key]:
                    del self._copies[key]
                    self._free(self._released_meanwhile.pop(key, []))
        with self._changed:
            self._check_open(key)

    def _check_open(self, key: AttemptKey) -> None:
        if self._closed:
            raise PoolError(f"{self.name}: the pool is closed")
        if key in self._released:
            raise Cancelled(f"request {key.request_id} attempt {key.attempt} was cancelled")

    def _free(self, spans: Iterable[Span]) -> None:
        for span in spans:
            self._allocator.free(span)
        self._changed.notify_all()

"""A stage's registered memory: reserve room, publish tensors from it, pull others' into it, release.

Who owns what: a slot belongs to the (request, attempt) it was reserved for. Releasing that key frees its slots at
once, is idempotent, and wins over a late finish: the key is never served again. Slots that are being copied to are
freed when that ends. The destination of a pull that ran out of time belongs to nobody until the peer is known dead.
What no slot takes may hold tensors that are kept for later requests: see `transfer.cache`.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import zip_longest

import torch

from disagg_ray.config.schema import TransportConfig
from disagg_ray.errors import Cancelled, ConfigError, PoolError, TransferError
from disagg_ray.transfer.allocator import plain_segments
from disagg_ray.transfer.cache import TensorCache
from disagg_ray.transfer.checksum import NAME, checksum
from disagg_ray.transfer.engine import TIMED_OUT, ReadTimeout, with_mooncake_file
from disagg_ray.transfer.handoff import AttemptKey, Handoff, Session, TensorMeta, TensorSpec
from disagg_ray.transfer.routes import HINTS, FailedRoutes, open_endpoints, shared_sessions
from disagg_ray.transfer.slots import HEADER_BYTES, SlotAllocator, Span, align, slot_bytes

logger = logging.getLogger("disagg_ray")

NONCE_BYTES = 16
_OWN_SEGMENT_BYTES = 32 * 2**20
"""Torch gives an allocation of this size a segment of its own, and only whole segments can be shared."""
_REMEMBERED_KEYS = 100_000
"""Released keys that are remembered, so that a late finish of one is refused."""
_REMEMBERED_DEAD = 1_000
"""Forgotten sessions that are remembered, so that what a read of one leaves behind is freed when it ends."""


class Pool:
    """Memory that is allocated and registered once, for `nbytes` of slots and, where they leave room, a cache.

    Thread-safe. `reserve` waits its turn, in call order; everything else takes no longer than its copies.
    """

    def __init__(
        self,
        name: str,
        nbytes: int,
        host: str,
        transport: TransportConfig,
        device: str = "cpu",
        cache_bytes: int = 0,
        taken: frozenset[str] = frozenset(),
    ) -> None:
        """Allocate, register and open the ways in; none of the `taken` names is given to a session."""
        self.name = name
        self._verify = transport.verify
        self._memory = _allocate(align(nbytes), device)
        self._mirror = (
            self._memory.new_zeros(len(self._memory), device="cpu", pin_memory=True) if self._on_gpu else None
        )
        self._stream = torch.cuda.Stream(self._memory.device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        mirror = self._memory if self._mirror is None else self._mirror
        self._endpoints = open_endpoints(host, with_mooncake_file(transport), self._memory, mirror, taken)
        self._failed = FailedRoutes()
        self._allocator = SlotAllocator(len(self._memory))
        self._changed = threading.Condition()
        self.cache = TensorCache(self._memory, self._allocator, self._changed, self._own_stream, cache_bytes)
        self._waiting: deque[object] = deque()
        self._slots: dict[AttemptKey, dict[str, Span]] = {}
        self._copying: dict[AttemptKey, int] = {}
        self._doomed: dict[AttemptKey, list[Span]] = {}
        self._quarantine: list[tuple[str, Span]] = []
        self._dead: OrderedDict[str, None] = OrderedDict()
        """Sessions that are forgotten, the last of them."""
        self._released: OrderedDict[AttemptKey, None] = OrderedDict()
        self._closed = False

    @property
    def _on_gpu(self) -> bool:
        return self._memory.is_cuda

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The ways into this pool, best first."""
        return tuple(endpoint.session for endpoint in self._endpoints.values())

    @property
    def met(self) -> frozenset[str]:
        """Names of the sessions that were read from: no other process can be reached under one of them."""
        return frozenset().union(*(endpoint.engine.met for endpoint in self._endpoints.values()))

    def route(self, handoff: Handoff) -> str:
        """Return the route by which a handoff is pulled."""
        shared = shared_sessions(self._endpoints, handoff.sessions, self._failed)
        return shared[0].route if shared else "none"

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

    def reserve(self, key: AttemptKey, sizes: Mapping[str, int], timeout_s: float | None = None) -> None:
        """Set room aside for tensors of at most these bytes, all or none; wait while the pool is full.

        Calls are served in order, and what is cached gives way before they wait. The wait ends when others release,
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
        """Return whether there would be room for tensors of these bytes if everybody released what they hold.

        What is quarantined is not theirs to release.
        """
        return sum(map(slot_bytes, sizes.values())) <= self.capacity - self.bytes_quarantined

    def _try_reserve(self, key: AttemptKey, sizes: Mapping[str, int]) -> bool:
        self._check_open(key)
        twice = self._slots.get(key, {}).keys() & sizes.keys()
        if twice:
            raise PoolError(f"{self.name}: room for {', '.join(sorted(twice))} was reserved before")
        if sum(map(slot_bytes, sizes.values())) > self.capacity - self.bytes_in_use:
            return False  # an empty cache would not help
        spans: dict[str, Span] = {}
        for name, size in sizes.items():
            span = self._allocate(slot_bytes(size))
            if span is None:
                for taken in spans.values():
                    self._allocator.free(taken)
                return False
            spans[name] = span
        self._slots.setdefault(key, {}).update(spans)
        return True

    def _allocate(self, nbytes: int) -> Span | None:
        while (span := self._allocator.allocate(nbytes)) is None and self.cache.evict():
            pass
        return span

    def publish(self, key: AttemptKey, tensors: Mapping[str, torch.Tensor]) -> Handoff:
        """Copy tensors into the slots reserved for them under their names, and say where they lie.

        Raises:
            Cancelled: `key` was released meanwhile.
            PoolError: a tensor is larger than its reservation.
        """
        with self._copies(key), self._own_stream(after_caller=True):
            metas = tuple(self._publish_one(key, name, tensor) for name, tensor in tensors.items())
        with self._changed:
            self._check_open(key)
        return Handoff(key, self.name, self.sessions, NAME, metas)

    def _publish_one(self, key: AttemptKey, name: str, tensor: torch.Tensor) -> TensorMeta:
        tensor = tensor.detach().contiguous()
        spec = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
        span = self._span(key, name)
        if slot_bytes(spec.nbytes) > span.nbytes:
            raise self._too_large(name, spec.nbytes)
        nonce = secrets.token_bytes(NONCE_BYTES)
        start = span.offset + HEADER_BYTES
        self._memory[span.offset : span.offset + NONCE_BYTES] = torch.frombuffer(bytearray(nonce), dtype=torch.uint8)
        self._memory[start : start + spec.nbytes] = tensor.view(-1).view(torch.uint8)
        padded = self._memory[start : start + _words(spec.nbytes)]
        if len(padded) > spec.nbytes:
            padded[spec.nbytes :] = 0
        if self._mirror is not None:
            end = start + len(padded)
            self._mirror[span.offset : end].copy_(self._memory[span.offset : end], non_blocking=True)
        digest = checksum(padded) if self._verify else None
        return TensorMeta(name, spec, self._memory.data_ptr() + span.offset, nonce, digest)

    def pull(self, key: AttemptKey, handoff: Handoff, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Read published tensors into the slots reserved for them and check them.

        The returned tensors lie in this pool: they are good until `key` is released.

        Raises:
            TransferError: the peer is gone, silent or refused; the bytes are stale or damaged.
            Cancelled: `key` was released meanwhile.
            PoolError: a tensor is larger than its reservation, or has none.
        """
        wanted = set(handoff.names if names is None else names)
        metas = [meta for meta in handoff.tensors if meta.name in wanted]
        with self._copies(key), self._own_stream():
            spans = [self._span(key, meta.name) for meta in metas]
            lengths = [HEADER_BYTES + _words(meta.spec.nbytes) for meta in metas]
            for meta, span, length in zip(metas, spans, lengths, strict=True):
                if length > span.nbytes:
                    raise self._too_large(meta.name, meta.spec.nbytes)
            peer = self._read(key, handoff, metas, spans, lengths)
            pulled = {
                meta.name: self._checked(meta, span, handoff, peer) for meta, span in zip(metas, spans, strict=True)
            }
        with self._changed:
            self._check_open(key)
        return pulled

    def relay(self, key: AttemptKey, handoff: Handoff) -> Handoff:
        """Say where the copy of a pulled handoff lies in this pool; headers and checksums came along with it."""
        metas = tuple(
            replace(meta, address=self._memory.data_ptr() + self._span(key, meta.name).offset)
            for meta in handoff.tensors
        )
        return Handoff(key, self.name, self.sessions, handoff.checksum, metas)

    def _read(
        self, key: AttemptKey, handoff: Handoff, metas: list[TensorMeta], spans: list[Span], lengths: list[int]
    ) -> Session:
        """Read by the best route that both ends have; one that fails is left for the next, for a while.

        A peer that hangs is not tried twice.
        """
        sessions = shared_sessions(self._endpoints, handoff.sessions, self._failed)
        if not sessions:
            theirs, ours = ([s.route for s in side] for side in (handoff.sessions, self.sessions))
            raise TransferError(
                f"{handoff.producer} offers {theirs} and {self.name} has {ours}", str(theirs), handoff.nbytes, 0
            )
        for session, following in zip_longest(sessions, sessions[1:]):
            endpoint = self._endpoints[session.route]
            local = [endpoint.memory.data_ptr() + span.offset for span in spans]
            try:
                endpoint.engine.read(session, local, [meta.address + session.shift for meta in metas], lengths)
            except ReadTimeout:
                self._set_aside(key, spans, session.name)
                raise
            except TransferError as error:
                self._forget_cuda_error()
                if following is None or error.code == TIMED_OUT:
                    raise
                pause_s = self._failed.fail(session)
                hint = HINTS.get(session.route, "")
                logger.warning("%s: pulls from %s go by %s for %.0f s, not by %s: %s%s", self.name, handoff.producer,
                               following.route, pause_s, session.route, error, hint)  # fmt: skip
                continue
            self._failed.succeed(session)
            self._dead.pop(session.name, None)  # it lives: the name is another's now
            if endpoint.memory is self._mirror:
                for span, length in zip(spans, lengths, strict=True):
                    end = span.offset + length
                    self._memory[span.offset : end].copy_(self._mirror[span.offset : end], non_blocking=True)
            return session
        raise AssertionError("the last session returned or raised")

    def _checked(self, meta: TensorMeta, span: Span, handoff: Handoff, peer: Session) -> torch.Tensor:
        start = span.offset + HEADER_BYTES
        found = bytes(self._memory[span.offset : span.offset + NONCE_BYTES].tolist())
        if found != meta.nonce:
            raise TransferError(
                f"{meta.name} is stale: its producer restarted or reused the slot", peer.name, meta.spec.nbytes, 0
            )
        if self._verify and meta.checksum is not None:
            if handoff.checksum != NAME or checksum(self._memory[start:][: _words(meta.spec.nbytes)]) != meta.checksum:
                raise TransferError(
                    f"{meta.name} arrived damaged: its checksum differs", peer.name, meta.spec.nbytes, 0
                )
        dtype: torch.dtype = getattr(torch, meta.spec.dtype)
        if math.prod(meta.spec.shape) * dtype.itemsize != meta.spec.nbytes:
            raise TransferError(f"{meta.name} is not as long as its shape says", peer.name, meta.spec.nbytes, 0)
        return self._memory[start : start + meta.spec.nbytes].view(dtype).view(meta.spec.shape)

    def is_released(self, key: AttemptKey) -> bool:
        return key in self._released

    def release(self, key: AttemptKey, names: Iterable[str] | None = None) -> None:
        """Free the key's slots, or only the named ones. Without names the key is never served again."""
        with self._changed:
            slots = self._slots.get(key, {})
            spans = [slots.pop(name) for name in list(slots if names is None else names) if name in slots]
            if key in self._copying:  # they are being written to: freed when that ends
                self._doomed.setdefault(key, []).extend(spans)
            else:
                self._free(spans)
            if names is None:
                self._slots.pop(key, None)
                self._released[key] = None
                while len(self._released) > _REMEMBERED_KEYS:
                    self._released.popitem(last=False)
            self._changed.notify_all()

    def forget(self, session: str) -> None:
        """Free what is quarantined, now or by a read that still runs, for a session whose process is known dead."""
        self._failed.forget(session)
        with self._changed:
            self._dead[session] = None
            while len(self._dead) > _REMEMBERED_DEAD:
                self._dead.popitem(last=False)
            freed = [span for name, span in self._quarantine if name == session]
            self._quarantine = [(name, span) for name, span in self._quarantine if name != session]
            self._free(freed)

    def close(self) -> None:
        """End every wait and give the memory back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for endpoint in self._endpoints.values():
            endpoint.engine.close()
            endpoint.engine.unregister(endpoint.memory.data_ptr())

    def _too_large(self, name: str, nbytes: int) -> PoolError:
        return PoolError(f"{self.name}: {name} has {nbytes} bytes, more than was reserved for it")

    def _span(self, key: AttemptKey, name: str) -> Span:
        with self._changed:
            self._check_open(key)
            try:
                return self._slots[key][name]
            except KeyError:
                raise PoolError(f"{self.name}: no room was reserved for {name}") from None

    def _check_open(self, key: AttemptKey) -> None:
        if self._closed:
            raise PoolError(f"{self.name}: the pool is closed")
        if key in self._released:
            raise Cancelled(f"request {key.request_id} attempt {key.attempt} was given up")

    @contextmanager
    def _copies(self, key: AttemptKey) -> Iterator[None]:
        """Hold back the freeing of a key's slots while they are written to."""
        with self._changed:
            self._check_open(key)
            self._copying[key] = self._copying.get(key, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._copying[key] -= 1
                if self._copying[key] == 0:
                    del self._copying[key]
                    self._free(self._doomed.pop(key, []))

    @contextmanager
    def _own_stream(self, *, after_caller: bool = False) -> Iterator[None]:
        """Copy on the pool's own CUDA stream and wait for it alone, so that a pull does not wait for a denoise."""
        if self._stream is None:
            yield
            return
        if after_caller:
            self._stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()  # a copy that was given up still runs

    def _forget_cuda_error(self) -> None:
        """Take the error that a failed CUDA call of Mooncake leaves for this thread's next kernel to find."""
        if self._on_gpu:
            with suppress(torch.AcceleratorError):
                torch.ones(1, device=self._memory.device)

    def _free(self, spans: Iterable[Span]) -> None:
        for span in spans:
            self._allocator.free(span)
        self._changed.notify_all()

    def _set_aside(self, key: AttemptKey, spans: Sequence[Span], session: str) -> None:
        """Keep the destination of a timed-out read from being handed out again."""
        with self._changed:
            slots, doomed = self._slots.get(key, {}), self._doomed.get(key, [])
            for name in [name for name, span in slots.items() if span in spans]:
                del slots[name]
            doomed[:] = [span for span in doomed if span not in spans]
            if session in self._dead:
                self._free(spans)
            else:
                self._quarantine += [(session, span) for span in spans]


def _allocate(nbytes: int, device: str) -> torch.Tensor:
    """Return zeroed memory that can be registered; on a GPU, an allocation that nothing else lies in.

    Raises:
        ConfigError: the GPU is too full.
    """
    if device == "cpu":
        return torch.zeros(nbytes, dtype=torch.uint8)
    try:
        with plain_segments():
            return torch.zeros(max(nbytes, _OWN_SEGMENT_BYTES), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"transport.pool_bytes: a pool of {nbytes} bytes does not fit the GPU, which has {free} of {total} free; "
            f"lower limits or pool_bytes, or give the stage more of a GPU"
        ) from error


def _words(nbytes: int) -> int:
    return -(-nbytes // 8) * 8

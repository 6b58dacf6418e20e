"""A stage's registered memory: reserve room, publish tensors from it, pull others' into it, release."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import zip_longest

import torch

from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import TransferError
from disagg_ray.transfer.checksum import NAME, checksum
from disagg_ray.transfer.engine import TIMED_OUT, ReadTimeout, with_mooncake_file
from disagg_ray.transfer.handoff import AttemptKey, Handoff, Session, TensorMeta, TensorSpec
from disagg_ray.transfer.memory import PoolMemory
from disagg_ray.transfer.reservations import Reservations
from disagg_ray.transfer.routes import HINTS, FailedRoutes, open_endpoints, shared_sessions
from disagg_ray.transfer.slots import HEADER_BYTES, Span, align

logger = logging.getLogger("disagg_ray")

NONCE_BYTES = 16


class Pool(Reservations):
    """Memory that is allocated and registered once, for `nbytes` of slots and, where they leave room, a cache.

    Thread-safe. Who owns its bytes: see `transfer.reservations`. Publishing and pulling take no longer than their
    copies.
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
        self.memory = PoolMemory(align(nbytes), device)
        super().__init__(name, self.memory, cache_bytes)
        self._verify = transport.verify
        data, mirror = self.memory.data, self.memory.host
        self.endpoints = open_endpoints(host, with_mooncake_file(transport), data, mirror, taken)
        """The ways into this pool by route, best first."""
        self.failed_routes = FailedRoutes()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The ways into this pool, best first, as peers need to know them."""
        return tuple(endpoint.session for endpoint in self.endpoints.values())

    @property
    def met(self) -> frozenset[str]:
        """Names of the sessions that were read from: no other process can be reached under one of them."""
        return frozenset().union(*(endpoint.engine.met for endpoint in self.endpoints.values()))

    def route(self, handoff: Handoff) -> str:
        """Return the route by which a handoff is pulled."""
        shared = shared_sessions(self.endpoints, handoff.sessions, self.failed_routes)
        return shared[0].route if shared else "none"

    def publish(self, key: AttemptKey, tensors: Mapping[str, torch.Tensor]) -> Handoff:
        """Copy tensors into the slots reserved for them under their names, and say where they are.

        Raises:
            Cancelled: `key` was released meanwhile.
            PoolError: a tensor is larger than its reservation.
        """
        with self.copying(key), self.memory.own_stream(after_caller=True):
            metas = tuple(self._publish_one(key, name, tensor) for name, tensor in tensors.items())
        return Handoff(key, self.name, self.sessions, NAME, metas)

    def _publish_one(self, key: AttemptKey, name: str, tensor: torch.Tensor) -> TensorMeta:
        tensor, data = tensor.detach().contiguous(), self.memory.data
        spec = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
        span = self.span(key, name, spec.nbytes)
        nonce = secrets.token_bytes(NONCE_BYTES)
        start = span.offset + HEADER_BYTES
        data[span.offset : span.offset + NONCE_BYTES] = torch.frombuffer(bytearray(nonce), dtype=torch.uint8)
        data[start : start + spec.nbytes] = tensor.view(-1).view(torch.uint8)
        padded = data[start : start + _words(spec.nbytes)]
        if len(padded) > spec.nbytes:
            padded[spec.nbytes :] = 0
        self.memory.to_mirror(span.offset, start + len(padded))
        digest = checksum(padded) if self._verify else None
        return TensorMeta(name, spec, data.data_ptr() + span.offset, nonce, digest)

    def pull(self, key: AttemptKey, handoff: Handoff, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Read published tensors into the slots reserved for them and check them.

        The returned tensors are this pool's memory: they are good until `key` is released.

        Raises:
            TransferError: the peer is gone, silent or refused; the bytes are stale or damaged.
            Cancelled: `key` was released meanwhile.
            PoolError: a tensor is larger than its reservation, or has none.
        """
        wanted = set(handoff.names if names is None else names)
        metas = [meta for meta in handoff.tensors if meta.name in wanted]
        with self.copying(key), self.memory.own_stream():
            spans = [self.span(key, meta.name, meta.spec.nbytes) for meta in metas]
            peer = self._read(key, handoff, metas, spans)
            return {
                meta.name: self._checked(meta, span, handoff, peer) for meta, span in zip(metas, spans, strict=True)
            }

    def relay(self, key: AttemptKey, handoff: Handoff) -> Handoff:
        """Say where the copy of a pulled handoff is in this pool; headers and checksums came along with it."""
        address = self.memory.data.data_ptr()
        metas = tuple(
            replace(meta, address=address + self.span(key, meta.name, meta.spec.nbytes).offset)
            for meta in handoff.tensors
        )
        return Handoff(key, self.name, self.sessions, handoff.checksum, metas)

    def _read(self, key: AttemptKey, handoff: Handoff, metas: list[TensorMeta], spans: list[Span]) -> Session:
        """Read by the best route that both ends have; one that fails is left for the next, for a while.

        A peer that hangs is not tried twice.
        """
        lengths = [HEADER_BYTES + _words(meta.spec.nbytes) for meta in metas]
        sessions = shared_sessions(self.endpoints, handoff.sessions, self.failed_routes)
        if not sessions:
            theirs, ours = ([s.route for s in side] for side in (handoff.sessions, self.sessions))
            raise TransferError(
                f"{handoff.producer} offers {theirs} and {self.name} has {ours}", str(theirs), handoff.nbytes, 0
            )
        for session, following in zip_longest(sessions, sessions[1:]):
            endpoint = self.endpoints[session.route]
            local = [endpoint.memory.data_ptr() + span.offset for span in spans]
            try:
                endpoint.engine.read(session, local, [meta.address + session.shift for meta in metas], lengths)
            except ReadTimeout:
                self.quarantine(key, spans, session.name)
                raise
            except TransferError as error:
                self.memory.forget_cuda_error()
                if following is None or error.code == TIMED_OUT:
                    raise
                pause_s = self.failed_routes.fail(session)
                hint = HINTS.get(session.route, "")
                logger.warning("%s: pulls from %s go by %s for %.0f s, not by %s: %s%s", self.name, handoff.producer,
                               following.route, pause_s, session.route, error, hint)  # fmt: skip
                continue
            self.failed_routes.succeed(session)
            self.note_alive(session.name)
            if endpoint.memory is self.memory.mirror:
                for span, length in zip(spans, lengths, strict=True):
                    self.memory.from_mirror(span.offset, span.offset + length)
            return session
        raise AssertionError("the last session returned or raised")

    def _checked(self, meta: TensorMeta, span: Span, handoff: Handoff, peer: Session) -> torch.Tensor:
        """Return a pulled tensor, as a view of its slot."""
        start, nbytes = span.offset + HEADER_BYTES, meta.spec.nbytes
        data = self.memory.data[start : start + nbytes]
        padded = self.memory.data[start : start + _words(nbytes)]
        dtype: torch.dtype = getattr(torch, meta.spec.dtype)
        if bytes(self.memory.data[span.offset : span.offset + NONCE_BYTES].tolist()) != meta.nonce:
            wrong = "is stale: its producer restarted or reused the slot"
        elif self._verify and meta.checksum is not None and (
            handoff.checksum != NAME or checksum(padded) != meta.checksum
        ):  # fmt: skip
            wrong = "arrived damaged: its checksum differs"
        elif math.prod(meta.spec.shape) * dtype.itemsize != nbytes:
            wrong = "is not as long as its shape says"
        else:
            return data.view(dtype).view(meta.spec.shape)
        raise TransferError(f"{meta.name} {wrong}", peer.name, nbytes, 0)

    def forget(self, session: str) -> None:
        """Note that the process behind a session is dead: what it might still have written to is free again."""
        self.failed_routes.forget(session)
        self.free_quarantine(session)

    def close(self) -> None:
        """End every wait and give the memory back."""
        self.close_waits()
        for endpoint in self.endpoints.values():
            endpoint.engine.close()
            endpoint.engine.unregister(endpoint.memory.data_ptr())


def _words(nbytes: int) -> int:
    """Return bytes rounded up to whole 8-byte words, as a checksum takes them."""
    return -(-nbytes // 8) * 8

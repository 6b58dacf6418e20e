"""All that Ray carries between stages."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple


class AttemptKey(NamedTuple):
    """Whom a slot belongs to: one try of a stage for a request."""

    request_id: str
    attempt: int


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will look like before it exists; pools reserve by it."""

    shape: tuple[int, ...]
    dtype: str
    """Torch's name, as float32."""
    nbytes: int


@dataclass(frozen=True)
class TensorMeta:
    """Where one published tensor is."""

    name: str
    spec: TensorSpec
    address: int
    """Of its slot's header in the pool, in the producer's address space."""
    nonce: bytes
    """The header's first bytes; a pull checks them, so a restarted process at the same address is noticed."""
    checksum: int | None
    """`transfer.checksum` of the data (128 bits), or None when `transport.verify` is off."""


@dataclass(frozen=True)
class Session:
    """One way into a pool, as a peer needs to know it."""

    route: str
    """Mooncake's protocol."""
    name: str
    """Mooncake's name of the engine, `host:port`."""
    machine: str = ""
    """Which machine it is on."""
    shift: int = 0
    """From an address in the pool to the same byte in the memory that this engine has registered."""


@dataclass(frozen=True)
class Handoff:
    """Says where a stage's output tensors lie. A few hundred bytes: it rides inline in Ray's reply."""

    key: AttemptKey
    producer: str
    """The replica, as transformer-0."""
    sessions: tuple[Session, ...]
    checksum: str
    """Name of the checksum's definition."""
    tensors: tuple[TensorMeta, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)

    def only(self, names: Collection[str]) -> Handoff:
        """Return it with these tensors alone."""
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor.name in names))

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)

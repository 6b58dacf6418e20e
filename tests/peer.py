"""A process of its own that publishes tensors, for tests of transfers between processes."""

import multiprocessing
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from disagg_ray.config.transport import TransportConfig
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import HEADER_BYTES

HOST = "127.0.0.1"
KEY = AttemptKey("published", 0)
TRANSPORT = TransportConfig(timeout_s=5)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["disagg_ray.transfer.pool"])  # each peer is a fork of it: no second import of torch


def make_tensors() -> dict[str, torch.Tensor]:
    """Return what every peer publishes, the same in each process."""
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 32, 64, generator=generator).bfloat16(),
        "latents": torch.randn(1, 16, 3, 8, 8, generator=generator),
        "frames": torch.randint(0, 256, (3, 5, 7), generator=generator, dtype=torch.uint8),
        "flow_shift": torch.tensor(2.5, dtype=torch.float64),
    }


def fill(pool: Pool, leave: int = 0) -> AttemptKey:
    """Reserve all that is free but `leave` bytes, which must lie in one piece; return the key to release."""
    key = AttemptKey(secrets.token_hex(8), 0)
    pool.reserve(key, {"filling": pool.capacity - pool.bytes_in_use - leave - HEADER_BYTES}, timeout_s=60)
    return key


def publish(pool: Pool) -> Handoff:
    """Publish the tensors anew, in the slots they had before if there were any."""
    tensors = make_tensors()
    pool.release(KEY, tensors)
    pool.reserve(KEY, {name: tensor.nbytes for name, tensor in tensors.items()})
    return pool.publish(KEY, tensors)


def flip_bit(pool: Pool, address: int) -> None:
    """Damage the third byte of a published tensor."""
    pool.memory.data[address - pool.memory.data.data_ptr() + HEADER_BYTES + 2] ^= 1


def _serve(connection: Connection, transport: TransportConfig, taken: frozenset[str]) -> None:
    pool = Pool("peer", 1 << 20, HOST, transport, taken=taken)
    connection.send(publish(pool))
    while True:
        action, arguments = connection.recv()
        connection.send(action(pool, *arguments))


class Peer(AbstractContextManager["Peer"]):
    """A running peer and the handoff of what it published; killed on leaving."""

    def __init__(self, port_range: str | None = None, taken: frozenset[str] = frozenset(), admit: str = "any") -> None:
        self._connection, theirs = _context.Pipe()
        arguments = (theirs, replace(TRANSPORT, port_range=port_range, admit=admit), taken)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.handoff: Handoff = self._connection.recv()
        self.session = self.handoff.sessions[0].name
        self.pid = self._process.pid

    def ask(self, action: Callable[..., Any], *arguments: object) -> Any:
        """Run a function of this module on the peer's pool, there."""
        self._connection.send((action, arguments))
        return self._connection.recv()

    def stop(self) -> None:
        """Make it hang: its ports stay open and nothing answers."""
        from helpers import stop  # which peers need not import

        assert self.pid is not None
        stop(self.pid)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __exit__(self, *_: object) -> None:
        self.kill()

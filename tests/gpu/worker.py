"""A process with a pool on a GPU of its own, which does what it is asked."""

import itertools
import logging
import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from peer import HOST, TRANSPORT

from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool

PUBLISHED = AttemptKey("published", 0)
MIB = 2**20

_attempts = itertools.count()

_context = multiprocessing.get_context("spawn")  # a fork of a process that has met CUDA cannot use it


def make_tensors(nbytes: int = 8 * MIB) -> dict[str, torch.Tensor]:
    """Return what every worker publishes, the same in each process; `nbytes` of it in one tensor."""
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 33, 63, generator=generator).bfloat16(),
        "latents": torch.randn(1, 16, 3, 7, 5, generator=generator),
        "frames": torch.randint(0, 256, (3, 5, 7), generator=generator, dtype=torch.uint8),
        "flow_shift": torch.tensor(2.5, dtype=torch.float64),
        "large": torch.randint(-(2**62), 2**62, (nbytes // 8,), generator=generator),
    }


def publish(pool: Pool, device: str, nbytes: int = 8 * MIB) -> Handoff:
    """Publish the tensors from a device, in the slots they had before if there were any."""
    tensors = {name: tensor.to(device) for name, tensor in make_tensors(nbytes).items()}
    pool.release(PUBLISHED, tensors)
    pool.reserve(PUBLISHED, {name: tensor.nbytes for name, tensor in tensors.items()})
    return pool.publish(PUBLISHED, tensors)


def growing(pool: Pool) -> set[bool]:
    """Return whether the segments that tensors of this process lie in grow: the pool's, and a new one's."""
    taken = torch.empty(64 * MIB, dtype=torch.uint8, device=pool.memory.data.device)
    grow = {segment["is_expandable"] for segment in torch.cuda.memory_snapshot()}
    del taken
    return grow


def pull(pool: Pool, handoff: Handoff) -> str:
    """Pull all of a handoff, check that it arrived whole, and return the route it took."""
    key = AttemptKey("pulled", next(_attempts))
    pool.reserve(key, {meta.name: meta.spec.nbytes for meta in handoff.tensors}, timeout_s=0)
    try:
        pulled = pool.pull(key, handoff)
        expected = make_tensors(pulled["large"].nbytes)
        assert pulled.keys() == expected.keys()
        for name, tensor in pulled.items():
            assert (tensor.device, tensor.dtype, tensor.shape) == (
                pool.memory.data.device, expected[name].dtype, expected[name].shape
            )  # fmt: skip
            assert torch.equal(tensor.cpu(), expected[name]), name
    finally:
        pool.release(key)
    return pool.route(handoff)


def usage(pool: Pool) -> tuple[int, int]:
    return pool.bytes_in_use, pool.bytes_quarantined


def _serve(connection: Connection, device: str, nbytes: int, protocol: str) -> None:
    logging.basicConfig(format=f"worker on {device}: %(message)s")
    if device != "cpu":
        torch.cuda.set_device(device)  # as in a replica, whose only GPU is the current one
    pool = Pool(f"worker-{device}", nbytes, HOST, replace(TRANSPORT, protocol=protocol), device)
    connection.send(None)
    while True:
        action, arguments = connection.recv()
        try:
            connection.send(action(pool, *arguments))
        except Exception as error:  # noqa: BLE001 - told to the test, which raises it
            connection.send(error)


class Worker(AbstractContextManager["Worker"]):
    """A running worker; killed on leaving."""

    def __init__(self, device: str, nbytes: int = 64 * MIB, protocol: str = "auto") -> None:
        self._connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, device, nbytes, protocol), daemon=True)
        self._process.start()
        theirs.close()
        self.answer()

    def ask(self, action: Callable[..., Any], *arguments: object) -> Any:
        """Run a function of this module on the worker's pool, there."""
        self.tell(action, *arguments)
        return self.answer()

    def tell(self, action: Callable[..., Any], *arguments: object) -> None:
        """Start what `ask` does; `answer` ends it."""
        self._connection.send((action, arguments))

    def answer(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __exit__(self, *_: object) -> None:
        self.kill()

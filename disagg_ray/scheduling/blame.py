"""Who is at fault when a stage fails, and what follows: the rules, without a clock, threads or I/O.

- What was given cannot be used (`InputError`): the request is. It fails at once.
- A replica is lost before it computes for the request, or with its whole node, or tensors do not arrive: neither is.
  The request is tried again, `SETBACKS_PER_ATTEMPT` times for each attempt that it has.
- A replica fails or dies while it computes: the request is charged one of `failures.max_attempts`, with the last of
  which it fails, and goes on to replicas that have not failed it, as long as there are any (`scheduler`).
- A living replica that failed `MAX_IN_A_ROW` requests in a row is broken, and is replaced. A request counts where it
  failed first; not at all once it has failed at a sound replica too, one whose last computation had succeeded. So one
  request that fails everywhere costs no replica. Nor is one replaced while no replica of the stage has computed
  anything since that one came: what never works does not work in another process either.
- An error after which CUDA fails whatever comes next ends the replica's process at once (`poisons`).
- A post whose replica does not start, or is lost before it has computed anything, is closed for a while, longer each
  time (`pause_s`), and never permanently, except in a pipeline of one's own whose configuration or model is at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from disagg_ray.errors import DisaggError

SETBACKS_PER_ATTEMPT = 10
"""Failures that cost no computing, as a pull that fails, which a request may have for each attempt that may fail."""
MAX_IN_A_ROW = 2
"""Requests that a living replica may fail, one after the other, before it is replaced."""
MAX_PAUSE_S = 60.0
"""Longest time that a post stays closed."""

POISON = re.compile(
    r"CUDA error|device-side assert|illegal memory access|uncorrectable ECC|"
    r"CUBLAS_STATUS_(?!NOT_SUPPORTED|INVALID_VALUE|ALLOC_FAILED)|"
    r"CUDNN_STATUS_(?!NOT_SUPPORTED|BAD_PARAM|ALLOC_FAILED)"
)
SHORTAGE = re.compile(r"out of memory", re.IGNORECASE)


def poisons(error: BaseException) -> bool:
    """Return whether an error leaves a process in which CUDA fails from now on; a plain lack of memory does not."""
    return any(
        isinstance(cause, RuntimeError)
        and (type(cause).__name__ == "AcceleratorError" or POISON.search(str(cause)) is not None)
        and SHORTAGE.search(str(cause)) is None
        for cause in _causes(error)
        if not isinstance(cause, DisaggError)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def pause_s(num_fruitless: int) -> float:
    """Return how long a post stays closed after that many replicas in a row that computed nothing."""
    return min(2.0 ** min(num_fruitless - 1, 10), MAX_PAUSE_S) if num_fruitless else 0.0


@dataclass(eq=False)
class _Record:
    """What is known of a replica."""

    born: int
    """Successes of the stage before it came."""
    held: set[str] = field(default_factory=set)
    """Requests that count against it."""
    is_fruitful: bool = False
    """It has computed something."""
    is_sound: bool = False
    """And that was what it did last."""


class Ledger:
    """What the replicas of one stage did; each call returns those that turned out to be broken."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._num_successes = 0

    def add(self, replica: str) -> None:
        self._records[replica] = _Record(self._num_successes)

    def remove(self, replica: str) -> None:
        """Forget a replica that is gone."""
        del self._records[replica]

    def is_fruitful(self, replica: str) -> bool:
        """Return whether a replica has computed anything."""
        return self._records[replica].is_fruitful

    def succeed(self, replica: str) -> list[str]:
        """Note that a replica computed something."""
        self._num_successes += 1
        if (record := self._records.get(replica)) is not None:
            record.held.clear()
            record.is_fruitful = record.is_sound = True
        return self._broken()

    def fail(self, replica: str, request: str, elsewhere: AbstractSet[str]) -> list[str]:
        """Note that a living replica failed a request, which had failed at others before."""
        if (record := self._records.get(replica)) is None:
            return []
        others = elsewhere - {replica}
        if not others:
            record.held.add(request)
        elif record.is_sound:
            for other in others & self._records.keys():
                self._records[other].held.discard(request)
        record.is_sound = False
        return self._broken()

    def _broken(self) -> list[str]:
        return [
            name
            for name, record in self._records.items()
            if len(record.held) >= MAX_IN_A_ROW and record.born < self._num_successes
        ]

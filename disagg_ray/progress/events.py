"""Events of a request's progress: small, bounded, checked when they arrive."""

from __future__ import annotations

import math
import time
from dataclasses import astuple, dataclass, field
from typing import Literal, get_args

import msgpack

State = Literal["waiting", "pulling", "running", "publishing", "done", "failed", "cancelled"]

STATES = frozenset(get_args(State))

FINAL = frozenset({"done", "failed", "cancelled"})
"""States that end an attempt."""

MAX_BYTES = 1024
"""Of an event on the wire."""

MAX_CHARS = 200

MAX_COUNT = 1_000_000
"""Of steps, and of attempts."""


@dataclass(frozen=True)
class Event:
    """A change in one attempt of one stage for a request."""

    request_id: str
    stage: str
    """Empty: the request as a whole, which is over."""
    replica: str
    """As transformer-0; empty while the request waits for one."""
    attempt: int
    """0 is the first."""
    state: State
    step: int = 0
    """Denoising steps done."""
    steps: int = 0
    """Denoising steps in all; 0 where there are none."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch, by the clock of the node it happened on."""
    num_ranks: int = 1
    """Of the replica."""


def pack(event: Event) -> bytes:
    """Return an event as it is sent: a msgpack array of its fields."""
    data: bytes = msgpack.packb(astuple(event))
    return data


WIRE = (str, str, str, int, str, int, int, float, int)
"""Types of an event's fields."""


def unpack(data: bytes) -> Event:
    """Return the event in `data`, which is untrusted.

    Raises:
        ValueError: it holds no valid event.
    """
    limits = {"max_str_len": 4 * MAX_CHARS, "max_array_len": len(WIRE)}
    fields = msgpack.unpackb(data, use_list=False, max_bin_len=0, max_map_len=0, max_ext_len=0, **limits)
    if not isinstance(fields, tuple) or tuple(map(type, fields)) != WIRE:
        raise ValueError("not the fields of an event")
    event = Event(*fields)
    names = (event.request_id, event.stage, event.replica)
    if not all(1 <= len(name) <= MAX_CHARS and name.isprintable() for name in names) or event.state not in STATES:
        raise ValueError("not the names in an event")
    counts = event.attempt, event.step, event.steps, event.num_ranks
    if not all(0 <= count <= MAX_COUNT for count in counts) or event.step > event.steps or not event.num_ranks:
        raise ValueError("not the numbers in an event")
    if not _is_time(event.time):
        raise ValueError("not the time of an event")
    return event


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0

"""Says progress in words: of one request, and of all."""

from __future__ import annotations

from disagg_ray.progress.board import Totals, Track
from disagg_ray.progress.events import Event
from disagg_ray.text import human_seconds, printable

MAX_ID_CHARS = 40


def shown_id(request_id: str) -> str:
    """Return an id as it is shown: no longer than a line has room for."""
    return printable(request_id, MAX_ID_CHARS)


def describe(track: Track, now: float) -> str:
    """Return the progress of a request, as `transformer-0 step 12/50, 38 s left`."""
    event = track.event
    if event.state == "waiting":
        return f"waiting for {event.stage}{_attempt(event)}"
    if event.state != "running" or not event.step:
        return f"{replica_of(event)} {event.state}{_attempt(event)}"
    left = track.seconds_left(now)
    time_left = "" if left is None else f", {human_seconds(left)} left"
    return f"{replica_of(event)} step {event.step}/{event.steps}{time_left}{_attempt(event)}"


def replica_of(event: Event) -> str:
    """Return a replica's name, and how many ranks it has, as `transformer-0 (4 ranks)`."""
    return f"{event.replica} ({event.num_ranks} ranks)" if event.num_ranks > 1 else event.replica


def _attempt(event: Event) -> str:
    return f", attempt {event.attempt + 1}" if event.attempt else ""


def summary(totals: Totals) -> str:
    """Return the progress of all requests, as `3 of 60 videos done, 1 failed, 4.2 a minute, 12 min left`."""
    of = "" if totals.total is None else f" of {totals.total}"
    parts = [f"{totals.done}{of} {totals.makes}s done"]
    if totals.failed:
        parts.append(f"{totals.failed} failed")
    if totals.videos_per_min is not None:
        parts.append(_rate(totals.videos_per_min))
    if totals.seconds_left:
        parts.append(f"{human_seconds(totals.seconds_left)} left")
    return ", ".join(parts)


def _rate(per_min: float) -> str:
    return f"{per_min:.1f} a minute" if per_min >= 1 else f"{per_min * 60:.1f} an hour"

"""One stage's work for one request, as the scheduler assigns it to a replica."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from disagg_ray.request import ResolvedRequest


@dataclass(frozen=True)
class Assignment:
    """Which replica a job is assigned to."""

    replica: str
    run: bool
    """True: compute there now. False: prefetch its inputs there and wait."""


@dataclass(eq=False)
class Job:
    """One stage's work for one request."""

    request_id: str
    work: float
    """In units that seconds grow with (`measure`)."""
    shape: Hashable
    """Jobs of equal shape take equally long on like hardware."""
    priority: int
    """Higher first."""
    sequence: int
    """Order of admission, kept when the job is tried again."""
    on_place: Callable[[Assignment | None], None]
    """Called when its place has changed; with None when the replica it was prefetched on is lost and it waits again.
    May call the scheduler."""
    avoid: frozenset[str] = frozenset()
    """Replicas that failed it: it goes to others as long as the stage has any."""
    place: Assignment | None = None
    """None: it waits. Set by the scheduler alone."""


def measure(request: ResolvedRequest, blocks: list[str]) -> tuple[float, tuple[int, ...]]:
    """Return the work and the shape of a stage's job, by its blocks; work is in pixels x frames x passes."""
    passes = request.num_passes if "denoise" in blocks else 1
    shape = (request.height, request.width, request.num_frames, passes)
    return float(request.height * request.width * request.num_frames * passes), shape

"""What a batch came to: counts, pace, and which stage holds it up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from disagg_ray.result import StageTiming


@dataclass(frozen=True)
class StageShare:
    """One stage's part in a batch."""

    stage: str
    num_replicas: int
    mean_s: float
    """Computing and publishing of one request; pulling hides behind the request before."""
    busy: float
    """Share of its replicas' time, from 0 to 1."""


@dataclass(frozen=True)
class Bottleneck:
    stage: str
    speedup: float
    """Predicted videos a minute with one more replica of it, over those now, while nothing else waits."""


@dataclass(frozen=True)
class Summary:
    """How a batch ended."""

    done: int
    """Written by this run."""
    already_done: int
    failed: int
    """In this run, or in an earlier one and not tried again."""
    invalid: int
    """Lines left out."""
    missing: int
    """Not finished: the run was stopped before."""
    retried: int
    """Of those done, how many needed a stage more than once."""
    seconds: float
    shares: tuple[StageShare, ...]
    stopped: str | None
    """Why the run ended before its end."""

    @property
    def complete(self) -> bool:
        """Whether every request of the file is done."""
        return not (self.failed or self.invalid or self.missing or self.stopped)

    def lines(self) -> list[str]:
        """Return it in words."""
        pace = 60 * self.done / self.seconds if self.seconds else 0.0
        text = [
            f"{self.done} done, {self.already_done} done before, {self.failed} failed, {self.invalid} invalid, "
            f"{self.missing} missing, {self.retried} retried; {self.seconds:.1f} s, {pace:.2f} videos a minute"
        ]
        text += [
            f"{share.stage}: {share.num_replicas} x {100 * share.busy:.0f} % busy, {share.mean_s:.3f} s a video"
            for share in self.shares
        ]
        if self.stopped:
            text.append(f"stopped: {self.stopped}; run it again to go on")
        if found := bottleneck(self.shares):
            text.append(f"bottleneck: {found.stage}; one more replica of it: {found.speedup:.2f} x as many videos")
        return text


class Tally:
    """Adds up where the time of finished requests went; holds a few numbers a stage."""

    def __init__(self) -> None:
        self.done = 0
        self.retried = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    def add(self, stages: tuple[StageTiming, ...]) -> None:
        """Count one finished request."""
        self.done += 1
        self.retried += any(timing.attempts > 1 for timing in stages)
        for timing in stages:
            self._seconds[timing.stage] += timing.compute_s + timing.publish_s
            self._counts[timing.stage] += 1

    def shares(self, replicas: Mapping[str, int], seconds: float) -> tuple[StageShare, ...]:
        """Return each stage's part in a run of so many seconds; `replicas` counts them by stage."""
        return tuple(
            StageShare(
                stage, count, self._seconds[stage] / max(1, self._counts[stage]),
                self._seconds[stage] / (count * seconds) if seconds else 0.0,
            )
            for stage, count in replicas.items()
        )  # fmt: skip


def bottleneck(shares: tuple[StageShare, ...]) -> Bottleneck | None:
    """Return the stage whose replicas together make the fewest videos a second, and what one more would give.

    A pipeline that never runs dry is as fast as its slowest stage; one more replica helps until the next one is.
    None: nothing was made.
    """
    paces = {share.stage: share.num_replicas / share.mean_s for share in shares if share.mean_s > 0}
    if not paces:
        return None
    slowest = min(paces, key=paces.__getitem__)
    (share,) = (share for share in shares if share.stage == slowest)
    faster = paces | {slowest: (share.num_replicas + 1) / share.mean_s}
    return Bottleneck(slowest, min(faster.values()) / paces[slowest])

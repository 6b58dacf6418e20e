"""How a batch went: counts, throughput, utilisation of the stages, and the bottleneck."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from disagg_ray.batch.records import Record


@dataclass(frozen=True)
class StageShare:
    """One stage's part in a batch."""

    stage: str
    num_replicas: int
    mean_s: float
    """Computing and publishing of one request; pulls overlap with the request before."""
    busy: float
    """Utilisation of its replicas, 0 to 1."""


@dataclass(frozen=True)
class Summary:
    """How a batch ended."""

    done: int
    """Written by this run."""
    already_done: int
    failed: int
    """In this run, or in an earlier one and not retried."""
    invalid: int
    """Lines that were skipped."""
    missing: int
    """Not finished, because the run was stopped."""
    retried: int
    """Of those done: requests of which a stage had several attempts."""
    seconds: float
    shares: tuple[StageShare, ...]
    stopped: str | None
    """Why the run was stopped, if it was."""
    makes: str
    """What the model makes: video or image."""
    recorded: int = 0
    """Lines that this run added to the manifest."""

    @property
    def complete(self) -> bool:
        """Whether every request of the file is done."""
        return not (self.failed or self.invalid or self.missing or self.stopped)

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        text = [
            f"{self.done} done, {self.already_done} done before, {self.failed} failed, {self.invalid} invalid, "
            f"{self.missing} missing, {self.retried} retried; {self._pace()}"
        ]
        text += [
            f"{share.stage}: {share.num_replicas} x {100 * share.busy:.0f} % busy, {share.mean_s:.3f} s a request"
            for share in self.shares
        ]
        if self.stopped:
            text.append(f"stopped: {self.stopped}; run it again to resume")
        return text + name_bottleneck(self.shares, self.makes)

    def _pace(self) -> str:
        if self.seconds:
            return f"{self.seconds:.1f} s, {60 * self.done / self.seconds:.2f} {self.makes}s a minute"
        if self.complete:
            return "everything is there already"
        return "nothing was made" + "; --retry-failed tries again what failed" * bool(self.failed)


class Tally:
    """Counts finished requests, and adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.done = self.failed = self.retried = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()

    @property
    def finished(self) -> int:
        return self.done + self.failed

    def add(self, record: Record) -> None:
        if record.status == "failed":
            self.failed += 1
            return
        self.done += 1
        self.retried += any(timing.attempts > 1 for timing in record.stages)
        for timing in record.stages:
            self._seconds[timing.stage] += timing.compute_s + timing.publish_s
            self._counts[timing.stage] += 1

    def shares(self, replicas: Mapping[str, int], seconds: float) -> tuple[StageShare, ...]:
        """Return each stage's part in a run of `seconds`, given the number of replicas by stage."""
        return tuple(
            StageShare(
                stage, count, self._seconds[stage] / max(1, self._counts[stage]),
                self._seconds[stage] / (count * seconds) if seconds else 0.0,
            )
            for stage, count in replicas.items()
        )  # fmt: skip


def bottleneck(shares: tuple[StageShare, ...]) -> tuple[str, float] | None:
    """Return the slowest stage, and the factor by which one more replica of it would raise the throughput.

    A pipeline that is always full is as fast as its slowest stage; one more replica helps until another stage is the
    slowest. None: nothing was made.
    """
    paces = {share.stage: share.num_replicas / share.mean_s for share in shares if share.mean_s > 0}
    if not paces:
        return None
    slowest = min(paces, key=paces.__getitem__)
    (share,) = (share for share in shares if share.stage == slowest)
    faster = paces | {slowest: (share.num_replicas + 1) / share.mean_s}
    return slowest, min(faster.values()) / paces[slowest]


def name_bottleneck(shares: tuple[StageShare, ...], makes: str) -> list[str]:
    """Return the line that names the bottleneck, if anything was made."""
    if (found := bottleneck(shares)) is None:
        return []
    return [f"bottleneck: {found[0]}; one more replica of it: {found[1]:.2f} x as many {makes}s"]

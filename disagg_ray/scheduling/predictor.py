"""How long a job will take, learned from those before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

LEARNING_RATE = 0.25
"""Weight of the newest measurement in an average."""
NUM_SHAPES = 1_000
"""Shapes whose seconds are remembered for each group of replicas; those learned longest ago are forgotten."""


@dataclass(eq=False)
class _Learned:
    """What has been measured of one group; averages lean on the newest."""

    seconds: float = 0.0
    work: float = 0.0
    by_shape: OrderedDict[Hashable, float] = field(default_factory=OrderedDict)


class Predictor:
    """Seconds a job takes on a group of like replicas: by its shape, else its work, else from the other groups."""

    def __init__(self) -> None:
        self._groups: dict[str, _Learned] = {}

    def learn(self, group: str, shape: Hashable, work: float, seconds: float) -> None:
        learned = self._groups.setdefault(group, _Learned(seconds, work))
        learned.seconds += LEARNING_RATE * (seconds - learned.seconds)
        learned.work += LEARNING_RATE * (work - learned.work)
        before = learned.by_shape.get(shape, seconds)
        learned.by_shape[shape] = before + LEARNING_RATE * (seconds - before)
        learned.by_shape.move_to_end(shape)
        if len(learned.by_shape) > NUM_SHAPES:
            learned.by_shape.popitem(last=False)

    def predict(self, group: str, shape: Hashable, work: float) -> float:
        """Return seconds; 0 as long as nothing has been measured anywhere."""
        learned = self._groups.get(group)
        if learned is None:
            return work * self.mean_rate()
        seconds = learned.by_shape.get(shape)
        return seconds if seconds is not None else work * _rate(learned)

    def mean_rate(self) -> float:
        """Return seconds per unit of work, each group counting alike."""
        rates = [_rate(learned) for learned in self._groups.values()]
        return sum(rates) / len(rates) if rates else 0.0


def _rate(learned: _Learned) -> float:
    return learned.seconds / learned.work if learned.work else 0.0

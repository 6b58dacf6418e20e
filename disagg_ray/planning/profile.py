"""What was measured of a model's stages on one kind of hardware, and the file that keeps it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disagg_ray.errors import PlanError
from disagg_ray.media.output import write_text

VERSION = 2
"""Of the file's schema."""


@dataclass(frozen=True)
class Load:
    """What decides how long a request takes."""

    height: int
    width: int
    num_frames: int
    passes: int
    """Forward passes of the transformer: the steps, twice as many with guidance."""

    @property
    def volume(self) -> int:
        return self.height * self.width * self.num_frames


@dataclass(frozen=True)
class Point:
    """One request, as one stage computed it."""

    load: Load
    compute_s: float
    turn_s: float
    """Of it what keeps others off the GPU: its models' calls (`disagg_ray.models.gpu_lock`)."""
    finish_s: float
    """Encoding the file, for the last stage."""
    work_bytes: int
    """GPU memory that torch held above the weights, what lay free in it included; 0 on a CPU."""
    handoff_bytes: int
    """Of the tensors that other stages read."""


@dataclass(frozen=True)
class StageProfile:
    """One stage on one kind of hardware."""

    name: str
    denoises: bool
    load_s: float
    """From nothing to weights on the device."""
    weights_bytes: int
    input_bytes: int
    """What the largest request within `limits` takes of a pool."""
    output_bytes: int
    cache_bytes: int
    points: tuple[Point, ...]

    def compute_s(self, load: Load) -> float:
        """Return the seconds of the blocks, from what was measured at the sizes next to this one."""
        return self._seconds(load, lambda point: point.compute_s)

    def turn_s(self, load: Load) -> float:
        """Return the seconds of them in which no other process computes on the GPU."""
        return self._seconds(load, lambda point: point.turn_s)

    def finish_s(self, load: Load) -> float:
        return self._between({v: _median([p.finish_s for p in ps]) for v, ps in self._sizes().items()}, load)

    def work_bytes(self, load: Load) -> float:
        return self._between({v: max(p.work_bytes for p in ps) for v, ps in self._sizes().items()}, load)

    def handoff_bytes(self, load: Load) -> float:
        return self._between({v: max(p.handoff_bytes for p in ps) for v, ps in self._sizes().items()}, load)

    def _sizes(self) -> dict[int, list[Point]]:
        sizes: dict[int, list[Point]] = {}
        for point in sorted(self.points, key=lambda point: point.load.volume):
            sizes.setdefault(point.load.volume, []).append(point)
        return sizes

    def _seconds(self, load: Load, seconds_of: Callable[[Point], float]) -> float:
        sizes = self._sizes().items()
        return self._between(
            {v: self._at(points, list(map(seconds_of, points)), load.passes) for v, points in sizes}, load
        )

    def _at(self, points: Sequence[Point], seconds: Sequence[float], passes: int) -> float:
        """Return the seconds of one size: only a transformer's grow with the passes, in a straight line."""
        counts = [float(point.load.passes) for point in points]
        if not self.denoises:
            return _median(seconds)
        if len(set(counts)) == 1:
            return _median(seconds) * passes / counts[0]
        slope, start = statistics.linear_regression(counts, seconds)
        return max(start, 0.0) + passes * slope if slope > 0 else _median(seconds) * passes / _median(counts)

    @staticmethod
    def _between(known: dict[int, float], load: Load) -> float:
        """Return a value at a size between, or beyond, those measured: a power law through the two next to it."""
        volumes = list(known)
        if len(volumes) == 1:
            (volume,) = volumes
            return known[volume]
        above = next((place for place, volume in enumerate(volumes) if volume >= load.volume), len(volumes) - 1)
        low, high = volumes[max(above, 1) - 1], volumes[max(above, 1)]
        if min(known[low], known[high]) <= 0:
            return max(known[low], known[high])
        exponent = math.log(known[high] / known[low]) / math.log(high / low)
        return float(known[low] * (load.volume / low) ** exponent)


@dataclass(frozen=True)
class Profile:
    """A model on one kind of hardware."""

    version: int
    kind: str
    """Ray's name of the GPU, or CPU: one thread of it."""
    hardware: str
    memory_bytes: int
    """Of one GPU."""
    model: str
    format: str
    """Of the files that were made."""
    handoff_bytes_per_s: float
    """Between two pools over loopback tcp: what is there at worst between two GPUs of one machine."""
    stages: tuple[StageProfile, ...]
    """Producers before consumers."""


def write_profile(profile: Profile, path: Path) -> None:
    """Raises OutputError: the file cannot be written."""
    write_text(path, json.dumps(asdict(profile), indent=2) + "\n")


def read_profile(path: Path) -> Profile:
    """Raises PlanError: no such file, not a profile, or one of another version."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise PlanError(
            f"profile: {str(path)!r} cannot be read: {error.strerror}; `disagg-ray profile` makes one"
        ) from error
    except ValueError as error:
        raise PlanError(f"profile: {str(path)!r} is not JSON: {error}; `disagg-ray profile` makes one") from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise PlanError(f"profile: {str(path)!r} has version {version!r}, not {VERSION}; measure again")
    try:
        return Profile(**found | {"stages": tuple(_read_stage(stage) for stage in found["stages"])})
    except (KeyError, TypeError) as error:
        raise PlanError(f"profile: {str(path)!r} is not whole: {error}; measure again") from error


def _read_stage(stage: dict[str, Any]) -> StageProfile:
    points = tuple(Point(**point | {"load": Load(**point["load"])}) for point in stage["points"])
    return StageProfile(**stage | {"points": points})


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))

"""Measurements of a model's stages on one kind of hardware, and their JSON file."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.errors import PlanError
from disagg_ray.media.output import write_text
from disagg_ray.replica.software import version_of
from disagg_ray.text import shown

VERSION = 5
"""Of the file's schema."""
DRIVER = Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver states its version."""


@dataclass(frozen=True)
class Load:
    """What a request's seconds depend on."""

    height: int
    width: int
    num_frames: int
    passes: int
    """Forward passes of the transformer: the steps, times two with CFG."""

    @property
    def volume(self) -> int:
        return self.height * self.width * self.num_frames


@dataclass(frozen=True)
class Point:
    """Measurements of one request in one stage."""

    load: Load
    compute_s: float
    turn_s: float
    """Part of `compute_s` in which no other process may compute on the GPU (`models.gpu_lock`)."""
    finish_s: float
    """Encoding the file; 0 but for the last stage."""
    work_bytes: int
    """Peak VRAM that torch reserved above the weights; 0 on a CPU."""
    handoff_bytes: int
    """Of the tensors that other stages read."""


@dataclass(frozen=True)
class StageProfile:
    """One stage on one kind of hardware."""

    name: str
    denoises: bool
    load_s: float
    """Loading the weights onto the device."""
    weights_bytes: int
    input_bytes: int
    """Pool memory of the largest request within `limits`."""
    output_bytes: int
    cache_bytes: int
    points: tuple[Point, ...]
    num_heads: int = 0
    """Of its transformer's attention; 0 where there is none."""
    num_blocks: int = 0
    """Of its transformer; 0 where there is none."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The ranks that computed it together; bytes and seconds are those of one of them."""

    def compute_s(self, load: Load) -> float:
        """Return the seconds of computing, interpolated between the measured sizes."""
        return self._interpolate(load, lambda points: self._seconds(points, [p.compute_s for p in points], load.passes))

    def turn_s(self, load: Load) -> float:
        """Return the part of them in which no other process may compute on the GPU."""
        return self._interpolate(load, lambda points: self._seconds(points, [p.turn_s for p in points], load.passes))

    def finish_s(self, load: Load) -> float:
        return self._interpolate(load, lambda points: _median([p.finish_s for p in points]))

    def work_bytes(self, load: Load) -> float:
        return self._interpolate(load, lambda points: max(p.work_bytes for p in points))

    def handoff_bytes(self, load: Load) -> float:
        return self._interpolate(load, lambda points: max(p.handoff_bytes for p in points))

    def _seconds(self, points: Sequence[Point], seconds: Sequence[float], passes: int) -> float:
        """Return the seconds at one size; those of a transformer grow linearly with the passes."""
        counts = [float(point.load.passes) for point in points]
        if not self.denoises:
            return _median(seconds)
        if len(set(counts)) == 1:
            return _median(seconds) * passes / counts[0]
        slope, start = statistics.linear_regression(counts, seconds)
        return max(start, 0.0) + passes * slope if slope > 0 else _median(seconds) * passes / _median(counts)

    def _interpolate(self, load: Load, value_of: Callable[[Sequence[Point]], float]) -> float:
        """Return a value at any size: a power law through the two measured sizes nearest to it."""
        sizes: dict[int, list[Point]] = {}
        for point in sorted(self.points, key=lambda point: point.load.volume):
            sizes.setdefault(point.load.volume, []).append(point)
        volumes = list(sizes)
        if len(volumes) == 1:
            return value_of(sizes[volumes[0]])
        above = next((place for place, volume in enumerate(volumes) if volume >= load.volume), len(volumes) - 1)
        low, high = volumes[max(above, 1) - 1], volumes[max(above, 1)]
        at_low, at_high = value_of(sizes[low]), value_of(sizes[high])
        if min(at_low, at_high) <= 0:
            return max(at_low, at_high)
        exponent = math.log(at_high / at_low) / math.log(high / low)
        return float(at_low * (load.volume / low) ** exponent)


@dataclass(frozen=True)
class Profile:
    """A model on one kind of hardware."""

    version: int
    kind: str
    """Ray's name of the GPU, or CPU."""
    hardware: str
    memory_bytes: int
    """Of one GPU."""
    speed: str
    """The configuration's preset."""
    versions: dict[str, str]
    """Of torch, diffusers and, where it is known, NVIDIA's driver."""
    model: str
    format: str
    """Of the encoded files."""
    handoff_bytes_per_s: float
    """Between two pools over loopback TCP, the slowest route within one machine."""
    stages: tuple[StageProfile, ...]
    """Producers before consumers, each measured on one GPU."""
    gangs: tuple[StageProfile, ...] = ()
    """Stages that several ranks computed together, on a GPU of this kind each."""


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, json.dumps(asdict(profile), indent=2) + "\n")


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        PlanError: the file cannot be read, is not a profile, or has another version.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
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
        stages = {key: tuple(map(_read_stage, found[key])) for key in ("stages", "gangs")}
        return Profile(**found | stages)
    except (KeyError, TypeError) as error:
        raise PlanError(f"profile: {str(path)!r} is incomplete: {error}; measure again") from error


def _read_stage(found: dict[str, Any]) -> StageProfile:
    points = tuple(Point(**point | {"load": Load(**point["load"])}) for point in found["points"])
    return StageProfile(**found | {"points": points, "parallel": ParallelConfig(**found["parallel"])})


def check_profile(profile: Profile, kind: str, speed: str) -> None:
    """Check that a profile was measured on a kind of GPU, with a preset and with the versions that run here.

    A driver is compared only where both machines have one.

    Raises:
        PlanError: it was measured otherwise; names both.
    """
    if profile.kind != kind:
        raise PlanError(
            f"invalid --profile of {shown(kind)}: it was measured on {profile.kind} ({profile.hardware}); measure on "
            f"{kind}, or give its relative speed, as --factors {kind}=0.35"
        )
    if profile.speed != speed:
        raise PlanError(
            f"invalid --profile of {kind}: it was measured with speed={profile.speed}, and the configuration has "
            f"speed={speed}; run `disagg-ray profile --speed {speed}`, or plan with --speed {profile.speed}"
        )
    here = installed_versions()
    others = [f"{name} {v} (here {here[name]})" for name, v in profile.versions.items() if here.get(name, v) != v]
    if others:
        raise PlanError(f"invalid --profile of {kind}: it was measured with {', '.join(others)}; measure again")


def installed_versions() -> dict[str, str]:
    """Return the versions of this machine that a profile depends on, without what the libraries are built for."""
    found = {name: version_of(name).partition("+")[0] for name in ("torch", "diffusers")}
    driver = re.search(r"Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    return found | ({"driver": driver[1]} if driver else {})


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))

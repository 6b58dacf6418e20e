"""Chooses the best of all sensible layouts on a cluster that may not exist yet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.errors import PlanError
from disagg_ray.planning.layouts import Layout, Stages, layouts
from disagg_ray.planning.parallel import CFG_SPEEDUP, ROWS_SPEEDUP, ULYSSES_SPEEDUP
from disagg_ray.planning.predict import Hardware, Prediction, Predictor
from disagg_ray.planning.profile import Load, Profile
from disagg_ray.text import medium, shown

MEMORY_GB = {"B200": 180, "H200": 141, "H100": 80, "L40S": 48, "L40": 48, "A40": 48, "A10G": 24, "L4": 24, "T4": 16}
"""Published memory of a GPU, by Ray's name of it."""
Aim = Literal["latency", "throughput"]
"""What layouts are sorted by: the seconds of a single request, or requests a minute."""
WORTH = 1.01
"""A split must do this much of the fused throughput to be preferred."""


@dataclass(frozen=True)
class Plan:
    """Predictions, best first, and the layouts that do not fit, with the reason."""

    stages: Stages
    load: Load
    predictions: tuple[Prediction, ...]
    misfits: tuple[tuple[Layout, str], ...]
    aim: Aim = "throughput"

    @property
    def best(self) -> Prediction:
        return self.predictions[0]

    @property
    def fused(self) -> Prediction | None:
        return next((prediction for prediction in self.predictions if prediction.layout.fused), None)


def parse_gpus(spec: str) -> dict[str, tuple[int, int | None]]:
    """Return count and memory in bytes (None: not given) of each kind in `8xH200,4xL40S` or `2xRTX4090:24`.

    Raises:
        PlanError: the text has another form, or names no GPU.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        match = re.fullmatch(r"(\d+)x([A-Za-z][\w-]*)(?::(\d+(?:\.\d+)?))?", part)
        if match is None:
            raise PlanError(f"gpus: {part!r} is not COUNTxKIND, as 8xH200, or 2xRTX4090:24 with the memory in GB")
        count, kind, memory = match.groups()
        if kind in found:
            raise PlanError(f"gpus: {kind} is named twice; add the counts up")
        if int(count):
            found[kind] = int(count), int(float(memory) * 1e9) if memory else None
    if not found:
        raise PlanError(f"gpus: {spec!r} names no GPU; write at least one, as 1xH200")
    return found


def equip(
    gpus: Mapping[str, tuple[int, int | None]], profiles: Mapping[str, Profile], speeds: Mapping[str, float]
) -> tuple[Hardware, ...]:
    """Join each kind of GPU with its profile, or with the only profile and a speed relative to it.

    Raises:
        PlanError: neither is given, the memory is not known, or the profiles are of different models.
    """
    if len({(profile.model, tuple(s.name for s in profile.stages)) for profile in profiles.values()}) != 1:
        raise PlanError("profile: give one, or several of the same model and stages")
    for kind, speed in speeds.items():
        if kind not in gpus or not 0 < speed < math.inf:
            raise PlanError(
                f"invalid --factors {shown(kind)}={speed:g}: must be a positive number for a kind in --gpus"
            )
    hardware = []
    for kind, (count, given) in gpus.items():
        profile = profiles.get(kind)
        if profile is None and (kind not in speeds or len(profiles) != 1):
            raise PlanError(
                f"gpus: no profile of {kind}, only of {', '.join(profiles)}; measure there with `disagg-ray profile` "
                f"and give --profile {kind}=FILE, or give its relative speed, as --factors {kind}=0.35"
            )
        memory = given or (profile.memory_bytes if profile is not None else MEMORY_GB.get(kind, 0) * 1_000_000_000)
        if not memory:
            raise PlanError(f"gpus: the memory of {kind} is not known; write it in GB, as {count}x{kind}:24")
        known = profile or next(iter(profiles.values()))
        hardware.append(Hardware(kind, count, memory, known, speeds.get(kind, 1.0)))
    return tuple(hardware)


def make_plan(
    hardware: Sequence[Hardware],
    load: Load,
    num_requests: int | None = None,
    gangs: Sequence[ParallelConfig] = (),
    aim: Aim = "throughput",
) -> Plan:
    """Predict every sensible layout, with transformers and decoders that are `gangs` too, and sort.

    By throughput, by the seconds of a single request, or by the makespan of `num_requests` that arrive at once.

    Raises:
        PlanError: no layout fits.
    """
    stages = _stages_of(hardware[0].profile)
    predictor = Predictor({gpus.kind: gpus for gpus in hardware}, stages, load)
    unique: dict[object, Prediction] = {}
    misfits, fits = [], set[ParallelConfig]()
    for layout in layouts({gpus.kind: gpus.count for gpus in hardware}, stages, gangs):
        ranks = layout.parallel_of(stages.denoiser)
        if replace(ranks, shard_weights=False) in fits and ranks.shard_weights:
            continue  # whole weights fit, and cost no exchange
        fitting, reason = predictor.fit(layout)
        if fitting is None:
            misfits.append((layout, reason))
        else:
            fits.add(ranks)
            unique[fitting.seats, fitting.fused, fitting.gangs] = predictor.predict(fitting)
    if not unique:
        raise PlanError(f"gpus: no layout fits; {misfits[-1][1]}; name GPUs with more memory, or set offload")

    def cost(prediction: Prediction) -> tuple[float, bool, float]:
        spent = prediction.makespan_s(num_requests) if num_requests else 60 / prediction.per_minute
        if aim == "latency":
            spent = prediction.latency_s
        worth = 1 if prediction.layout.fused else WORTH
        return round(spent * worth, 6), not prediction.layout.fused, -prediction.per_minute

    return Plan(stages, load, tuple(sorted(unique.values(), key=cost)), tuple(misfits), aim)


def _stages_of(profile: Profile) -> Stages:
    denoisers = [stage.name for stage in profile.stages if stage.denoises]
    if len(denoisers) != 1:
        raise PlanError(f"profile: exactly one stage must denoise, found {denoisers}")
    return Stages(tuple(stage.name for stage in profile.stages), denoisers[0])


def explain(plan: Plan) -> str:
    """Return three lines: the best layout, why it is, and its memory."""
    best, fused = plan.best, plan.fused
    made = medium(plan.load.num_frames)
    pace, latency = f"{best.per_minute:.4g} {made}s a minute", f"{best.latency_s:.2f} s for a single request"
    if fused and best is not fused:
        pace += f", {best.per_minute / fused.per_minute:.2f} of fused"
        latency += f" ({fused.latency_s:.2f} fused)"
    most, seat = max(zip(best.gpu_bytes, best.layout.seats, strict=True), key=lambda pair: pair[0])
    if fused:
        fused_memory = f"fused takes {max(fused.gpu_bytes) / 1e9:.1f}"
    else:
        reasons = (reason for layout, reason in plan.misfits if layout.fused)
        fused_memory = f"fused does not fit: {next(reasons, 'no room')}"
    return (
        f"Best: {best.layout.name}: {pace}, {latency}.\n"
        f"Why: {_why(plan)}\n"
        f"Memory: at most {most / 1e9:.1f} GB, of a {seat.kind} with {' and '.join(seat.stages)}; {fused_memory}."
    )


def _why(plan: Plan) -> str:
    best, fused = plan.best, plan.fused
    if plan.aim == "latency":
        return _why_soonest(plan)
    limits = f"{best.bottleneck} is the bottleneck, {plan.stages.denoiser}'s GPUs are {best.busy:.0%} busy"
    if fused is None:
        return f"the whole model fits no GPU; {limits}."
    if best is not fused:
        return f"{limits}, and each stage is where it is fast or fits."
    rival = next((p for p in plan.predictions if not p.layout.fused), None)
    if rival is None:
        return "fused keeps every GPU busy without handoffs; no split fits."
    share = rival.per_minute / fused.per_minute
    return f"fused keeps every GPU busy without handoffs; the best split, {rival.layout.name}, does {share:.2f} of it."


def _why_soonest(plan: Plan) -> str:
    """Return what ranks gain for a single request, or why there are none."""
    gangs = plan.best.layout.gangs
    alone = next((p for p in plan.predictions if not p.layout.gangs), None)
    if not gangs:
        return "a single request takes each stage once, on one GPU; no gang is sooner."
    if alone is None:
        return f"only {gangs[0][1].size} GPUs together hold the {plan.stages.denoiser}."
    does = {plan.stages.denoiser: "denoise", plan.stages.decoder: "decode"}
    one = f"one {medium(plan.load.num_frames)} together"
    together = ", ".join(f"{ranks.size} GPUs {does[stage]} {one}" for stage, ranks in gangs)
    return f"{together}; without a gang it takes {alone.latency_s:.2f} s."


def footnotes(plan: Plan) -> list[str]:
    """Return what to know about the gangs of a plan."""
    found = [(prediction.estimated, ranks) for prediction in plan.predictions for _, ranks in prediction.layout.gangs]
    notes = []
    if any(estimated for estimated, _ in found):
        notes.append(
            f"* estimated from one GPU: {CFG_SPEEDUP:g} x for cfg 2, {ULYSSES_SPEEDUP:g} x for each doubling of "
            f"ulysses, as on two H100 of one host; `disagg-ray profile --parallel` measures it"
        )
    if any(estimated and ranks.rows > 1 for estimated, ranks in found):
        notes.append(f"* rows: {ROWS_SPEEDUP:g} x for each doubling of rows, as on two H200")
    if any(estimated and ranks.shard_weights for estimated, ranks in found):
        notes.append("* shard_weights: its exchange of weights is not counted (2.5 % of 14B on two H200 with NVLink)")
    if any(ranks.cfg > 1 for _, ranks in found):
        notes.append("cfg 2: a request without guidance leaves half of such a gang idle")
    return notes

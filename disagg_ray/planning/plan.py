"""What fused and every sensible split would do on GPUs that one may not have yet, from a measured profile.

A pipeline of stages: its throughput is that of the slowest stage, each the sum of its replicas' rates. Stages that
share a GPU compute by turns. A request alone takes the sum of its stages and handoffs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagg_ray.config.schema import REPLICA_WINDOW
from disagg_ray.errors import PlanError
from disagg_ray.planning.layouts import CPU, Layout, Seat, Stages, layouts
from disagg_ray.planning.profile import Load, Profile, StageProfile
from disagg_ray.replica.sizing import slots_bytes
from disagg_ray.text import shown

MEMORY_GB = {"B200": 180, "H200": 141, "H100": 80, "L40S": 48, "L40": 48, "A40": 48, "A10G": 24, "L4": 24, "T4": 16}
"""Published memory of a GPU, by Ray's name of it."""
USABLE_SHARE = 0.95
"""Of a GPU's memory: allocators leave gaps."""
CONTEXT_BYTES = 600_000_000
"""What CUDA and its libraries take for each process on a GPU."""
CALL_S = 0.004
"""What Ray's messages add to each stage of a request."""
WORTH = 1.01
"""A split that does less than this much of what fused does is not worth its parts."""


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind, and what is known of them."""

    kind: str
    count: int
    memory_bytes: int
    profile: Profile
    speed: float = 1.0
    """Of these GPUs, as a multiple of the one in the profile."""

    def stage(self, name: str) -> StageProfile:
        return next(stage for stage in self.profile.stages if stage.name == name)

    def compute_s(self, name: str, load: Load) -> float:
        return self.stage(name).compute_s(load) / self.speed

    def turn_s(self, name: str, load: Load) -> float:
        return self.stage(name).turn_s(load) / self.speed

    def finish_s(self, name: str, load: Load) -> float:
        return self.stage(name).finish_s(load)


@dataclass(frozen=True)
class Prediction:
    """What a layout would do."""

    layout: Layout
    per_minute: float
    """Videos, in steady state."""
    latency_s: float
    """Of one request alone."""
    max_vram_bytes: tuple[int, ...]
    """Taken of a GPU, by seat."""
    bottleneck: str
    """What limits the throughput."""
    busy: float
    """Share of the time that the transformer's GPUs work, in steady state."""

    def makespan_s(self, num_requests: int) -> float:
        """Return the seconds until the last of so many requests that come at once."""
        return self.latency_s + 60 * (num_requests - 1) / self.per_minute


@dataclass(frozen=True)
class Plan:
    """Predictions, best first, and the layouts that do not fit with the reason."""

    stages: Stages
    load: Load
    predictions: tuple[Prediction, ...]
    misfits: tuple[tuple[Layout, str], ...]
    best: Prediction

    @property
    def fused(self) -> Prediction | None:
        return next((prediction for prediction in self.predictions if prediction.layout.fused), None)


def parse_gpus(spec: str) -> dict[str, tuple[int, int | None]]:
    """Return count and memory in bytes (None: not said) of each kind in `8xH200,4xL40S` or `2xRTX4090:24`.

    Raises:
        PlanError: the text is something else, or says no GPU.
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


def equip(gpus: Mapping[str, tuple[int, int | None]], profiles: Mapping[str, Profile], speeds: Mapping[str, float]
          ) -> tuple[Hardware, ...]:  # fmt: skip
    """Join the GPUs with what was measured: each kind has a profile (by kind), or a speed relative to the only one.

    Raises:
        PlanError: neither is there, the memory is not known, or the profiles are of different models.
    """
    if len({(profile.model, tuple(s.name for s in profile.stages)) for profile in profiles.values()}) != 1:
        raise PlanError("profile: give one, or several of the same model and stages")
    for kind, speed in speeds.items():
        if kind not in gpus or speed <= 0:
            raise PlanError(f"invalid --speed {shown(kind)}={speed:g}: must be a positive number for a kind in --gpus")
    return tuple(_equip(kind, count, memory, profiles, speeds) for kind, (count, memory) in gpus.items())


def _equip(kind: str, count: int, memory: int | None, profiles: Mapping[str, Profile], speeds: Mapping[str, float]
           ) -> Hardware:  # fmt: skip
    profile = profiles.get(kind)
    if profile is None and (kind not in speeds or len(profiles) != 1):
        raise PlanError(
            f"gpus: no profile of {kind}, only of {', '.join(profiles)}; measure there with `disagg-ray profile` and "
            f"give --profile {kind}=FILE, or state how fast it is, as --speed {kind}=0.35"
        )
    known = profile.memory_bytes if profile is not None else MEMORY_GB.get(kind, 0) * 1_000_000_000
    if not (memory or known):
        raise PlanError(f"gpus: the memory of {kind} is not known; write it in GB, as {count}x{kind}:24")
    return Hardware(kind, count, memory or known, profile or next(iter(profiles.values())), speeds.get(kind, 1.0))


def make_plan(hardware: Sequence[Hardware], load: Load, num_requests: int | None = None) -> Plan:
    """Predict every sensible layout; the best has the highest throughput, or the first to be done with so many.

    Raises:
        PlanError: the weights fit nowhere.
    """
    stages = stages_of(hardware[0].profile)
    kinds = {gpus.kind: gpus for gpus in hardware}
    predictions, misfits = [], []
    for layout in layouts({gpus.kind: gpus.count for gpus in hardware}, stages):
        fitting, reason = _fit(layout, kinds, load, stages)
        if fitting is None:
            misfits.append((layout, reason))
        else:
            predictions.append(predict(fitting, kinds, load, stages))
    if not predictions:
        raise PlanError(f"gpus: the model fits in no way; {misfits[-1][1]}; name GPUs with more memory, or offload")
    unique = {(*prediction.layout.seats, prediction.layout.fused): prediction for prediction in predictions}

    def cost(prediction: Prediction) -> tuple[float, bool]:
        spent = prediction.makespan_s(num_requests) if num_requests else 60 / prediction.per_minute
        return spent * (1 if prediction.layout.fused else WORTH), not prediction.layout.fused

    ordered = sorted(unique.values(), key=cost)
    return Plan(stages, load, tuple(ordered), tuple(misfits), ordered[0])


def stages_of(profile: Profile) -> Stages:
    denoisers = [stage.name for stage in profile.stages if stage.denoises]
    if len(denoisers) != 1:
        raise PlanError(f"profile: exactly one stage must denoise, found {denoisers}")
    return Stages(tuple(stage.name for stage in profile.stages), denoisers[0])


def _fit(layout: Layout, kinds: Mapping[str, Hardware], load: Load, stages: Stages) -> tuple[Layout | None, str]:
    """Leave out the seats that have no room; None, and why, where a stage is left without any."""
    reason, seats = "", []
    for seat in layout.seats:
        needed, room = seat_bytes(seat, layout, kinds[seat.kind], load), USABLE_SHARE * kinds[seat.kind].memory_bytes
        if needed <= room:
            seats.append(seat)
        else:
            reason = f"{' and '.join(seat.stages)} take {needed / 1e9:.1f} GB of {room / 1e9:.1f} on a {seat.kind}"
    fitting = Layout(layout.name, tuple(seats), layout.fused)
    if all(fitting.replicas(stage) for stage in stages.order):
        return fitting, reason
    return None, reason


def predict(layout: Layout, kinds: Mapping[str, Hardware], load: Load, stages: Stages) -> Prediction:
    """Return what a layout that fits would do."""
    rates = _rates(layout, kinds, load, stages)
    bottleneck = min(rates, key=rates.__getitem__)
    rate = rates[bottleneck]
    memory = tuple(seat_bytes(seat, layout, kinds[seat.kind], load) for seat in layout.seats)
    busy = min(1.0, rate / rates.get(stages.denoiser, rate))
    return Prediction(layout, 60 * rate, latency_s(layout, kinds, load), memory, bottleneck, busy)


def _rates(layout: Layout, kinds: Mapping[str, Hardware], load: Load, stages: Stages) -> dict[str, float]:
    """Return the videos a second that each part could do, were the others without limit.

    Helpers beside a transformer take turns with it (`models.gpu_lock`): they wait for one forward each time, and
    the transformers have what is left. With the rates of all transformers, of those beside some helpers, and of these
    helpers, rate = denoise - sum of rate / helpers x beside.
    """
    if layout.fused:
        return {"fused": sum(seat.count / _pace_s(seat.stages, kinds[seat.kind], load) for seat in layout.seats)}
    rates: dict[str, float] = {}
    beside: dict[str, float] = {}
    undisturbed: dict[str, float] = {}
    denoise = 0.0
    for seat in layout.seats:
        gpus, helpers = kinds[seat.kind], tuple(stage for stage in seat.stages if stage != stages.denoiser)
        name, shared = " and ".join(helpers), stages.denoiser in seat.stages
        if shared:
            rate = seat.count / gpus.compute_s(stages.denoiser, load)
            denoise += rate
            beside[name] = beside.get(name, 0.0) + rate
        if helpers:
            forward = gpus.compute_s(stages.denoiser, load) / load.passes if shared else 0.0
            rates[name] = rates.get(name, 0.0) + seat.count / _pace_s(helpers, gpus, load, waiting_s=forward)
            turns = _turns_s(helpers, gpus, load)
            undisturbed[name] = undisturbed.get(name, 0.0) + (seat.count / turns if turns else math.inf)
    taken = sum(rate / undisturbed[name] for name, rate in beside.items() if name in undisturbed)
    return rates | {stages.denoiser: denoise / (1 + taken)}


def _pace_s(stages: Sequence[str], gpus: Hardware, load: Load, waiting_s: float = 0.0) -> float:
    """Return the seconds after which processes that do these stages in turn can begin with the next video.

    A file is encoded beside the next video's computing, but for a core that does both. While a process works on the
    host, another may have its turn: so much of `waiting_s`, which is for that turn, is no loss.
    """
    if gpus.kind == CPU:
        return waiting_s + _turns_s(stages, gpus, load)
    computing = sum(gpus.compute_s(stage, load) for stage in stages)
    host = computing - _turns_s(stages, gpus, load)
    finishing = sum(gpus.finish_s(stage, load) for stage in stages)
    return max(computing + max(0.0, waiting_s - host), finishing)


def _turns_s(stages: Sequence[str], gpus: Hardware, load: Load) -> float:
    """Return the seconds for which one video's stages keep a GPU, or a core, from other processes' work."""
    if gpus.kind == CPU:
        return sum(_alone_s(gpus, stage, load) for stage in stages)
    return sum(gpus.turn_s(stage, load) for stage in stages)


def latency_s(layout: Layout, kinds: Mapping[str, Hardware], load: Load) -> float:
    """Return the seconds of one request alone, each stage on its fastest replica."""
    if layout.fused:
        whole = [sum(_alone_s(kinds[s.kind], stage, load) for stage in s.stages) for s in layout.seats]
        return min(whole) + CALL_S
    seconds = 0.0
    for stage in dict.fromkeys(stage for seat in layout.seats for stage in seat.stages):
        holders = [kinds[seat.kind] for seat in layout.seats if stage in seat.stages]
        handoff = holders[0].stage(stage).handoff_bytes(load) / holders[0].profile.handoff_bytes_per_s
        seconds += min(_alone_s(gpus, stage, load) for gpus in holders) + handoff + CALL_S
    return seconds


def _alone_s(gpus: Hardware, stage: str, load: Load) -> float:
    return gpus.compute_s(stage, load) + gpus.finish_s(stage, load)


def seat_bytes(seat: Seat, layout: Layout, gpus: Hardware, load: Load) -> int:
    """Return the memory that the stages of a seat take of one GPU: weights, pools, work, and CUDA itself."""
    profiles = [gpus.stage(stage) for stage in seat.stages]
    weights, work = sum(p.weights_bytes for p in profiles), [p.work_bytes(load) for p in profiles]
    context = 0 if gpus.kind == CPU else CONTEXT_BYTES
    if layout.fused:
        replicas = layout.replicas(seat.stages[0])
        slots = slots_bytes(0, profiles[-1].output_bytes, REPLICA_WINDOW * replicas, replicas, last=True)
        return int(weights + max(work) + slots + max(p.cache_bytes for p in profiles) + context)
    every = dict.fromkeys(stage for other in layout.seats for stage in other.stages)
    in_flight = REPLICA_WINDOW * sum(layout.replicas(stage) for stage in every)
    last = gpus.profile.stages[-1].name
    pools = 0
    for p in profiles:
        replicas = layout.replicas(p.name)
        pools += slots_bytes(p.input_bytes, p.output_bytes, in_flight, replicas, last=p.name == last) + p.cache_bytes
    return int(weights + sum(work) + pools + len(profiles) * context)


def explain(plan: Plan) -> str:
    """Return in three lines what is best, why, and what it costs in memory and waiting."""
    best, fused = plan.best, plan.fused
    against = f", {best.per_minute / fused.per_minute:.2f} of fused" if fused and best is not fused else ""
    seconds = f"{best.latency_s:.2f} s for one alone" + (
        f" ({fused.latency_s:.2f} fused)" if fused and best is not fused else ""
    )
    memory = max(zip(best.max_vram_bytes, best.layout.seats, strict=True), key=lambda pair: pair[0])
    lines = [
        f"Best: {best.layout.name}: {best.per_minute:.4g} videos a minute{against}, {seconds}.",
        f"Why: {_why(plan)}",
        f"Memory: {memory[0] / 1e9:.1f} GB at most, of a {memory[1].kind} with {' and '.join(memory[1].stages)}; "
        + (f"fused takes {max(fused.max_vram_bytes) / 1e9:.1f}." if fused else f"fused does not fit: {_misfit(plan)}."),
    ]
    return "\n".join(lines)


def _why(plan: Plan) -> str:
    best, fused = plan.best, plan.fused
    if fused is None:
        return f"the whole fits no GPU; {best.bottleneck} sets the pace, {plan.stages.denoiser} busy {best.busy:.0%}."
    if best is fused:
        rival = next((p for p in plan.predictions if not p.layout.fused), None)
        said = (
            f"the best split, {rival.layout.name}, does {rival.per_minute / fused.per_minute:.2f} of it"
            if rival
            else ("no split fits")
        )
        return f"fused keeps every GPU at work and hands nothing over; {said}."
    return (
        f"{best.bottleneck} sets the pace; {plan.stages.denoiser}'s GPUs are busy {best.busy:.0%} "
        f"and each stage lies where it is fast or fits."
    )


def _misfit(plan: Plan) -> str:
    return next((reason for layout, reason in plan.misfits if layout.fused), "no room")

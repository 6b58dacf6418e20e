"""Predicts throughput, latency and memory of a layout from measured profiles.

A pipeline's throughput is that of its slowest stage; a stage's is the sum over its replicas. Stages on one GPU take
turns. The latency of a single request is the sum over its stages and handoffs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.schema import REPLICA_WINDOW
from disagg_ray.planning.layouts import CPU, Layout, Seat, Stages
from disagg_ray.planning.parallel import ALONE, estimate, to_mapping
from disagg_ray.planning.profile import Load, Profile, StageProfile
from disagg_ray.replica.sizing import slots_bytes

USABLE_SHARE = 0.95
"""Of a GPU's memory: allocators leave gaps."""
CONTEXT_BYTES = 600_000_000
"""Of each process on a GPU: CUDA and its libraries."""
CALL_S = 0.004
"""Of Ray's messages, per stage of a request."""


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind with their profile."""

    kind: str
    count: int
    memory_bytes: int
    profile: Profile
    speed: float = 1.0
    """Relative to the GPU of the profile."""

    def stage(self, name: str, parallel: ParallelConfig = ALONE) -> StageProfile:
        """Return what was measured of a stage on one GPU, or by each rank of a gang; of a gang it may be estimated."""
        alone = next(stage for stage in self.profile.stages if stage.name == name)
        if not parallel.is_gang:
            return alone
        return self.measured(name, parallel) or estimate(alone, parallel)

    def measured(self, name: str, parallel: ParallelConfig) -> StageProfile | None:
        """Return what a rank of a gang measured, if the profile has it."""
        gangs = (gang for gang in self.profile.gangs if gang.name == name)
        return next((gang for gang in gangs if to_mapping(gang.parallel) == to_mapping(parallel)), None)

    def compute_s(self, name: str, load: Load, parallel: ParallelConfig = ALONE) -> float:
        return self.stage(name, parallel).compute_s(load) / self.speed

    def turn_s(self, name: str, load: Load, parallel: ParallelConfig = ALONE) -> float:
        return self.stage(name, parallel).turn_s(load) / self.speed

    def alone_s(self, name: str, load: Load, parallel: ParallelConfig = ALONE) -> float:
        """Return the seconds of one request on an idle replica, with the encoding of its file."""
        return self.compute_s(name, load, parallel) + self.stage(name).finish_s(load)


@dataclass(frozen=True)
class Prediction:
    """Throughput, latency and memory of a layout."""

    layout: Layout
    per_minute: float
    """Videos, in steady state."""
    latency_s: float
    """Of a single request."""
    gpu_bytes: tuple[int, ...]
    """Memory used on one GPU, by seat."""
    bottleneck: str
    busy: float
    """Utilisation of the transformer's GPUs in steady state, 0 to 1."""
    estimated: bool = False
    """Of a gang that no profile has measured: from one GPU (`parallel`)."""
    paces: tuple[tuple[float, float], ...] = ()
    """Of each part: videos a second, and seconds from one to the next of its fastest replica."""

    def makespan_s(self, num_requests: int) -> float:
        """Return the seconds until the last of `num_requests` that arrive at once is done.

        A part takes as many at once as it has replicas, slower ones counted as fractions of its fastest: the last
        request is delayed by the rounds before its own at the part where they take longest.
        """
        rounds = ((math.ceil(round(num_requests / (rate * each_s), 6)), each_s) for rate, each_s in self.paces)
        return self.latency_s + max((number - 1) * each_s for number, each_s in rounds)


@dataclass(frozen=True)
class Predictor:
    """Predicts layouts of one model for one kind of request."""

    kinds: Mapping[str, Hardware]
    stages: Stages
    load: Load

    def fit(self, layout: Layout) -> tuple[Layout | None, str]:
        """Leave out the seats that do not fit their GPU; None, with the reason, if a stage is left without a seat."""
        reason, seats = "", []
        for seat in layout.seats:
            needed, usable = self.seat_bytes(seat, layout), USABLE_SHARE * self.kinds[seat.kind].memory_bytes
            if needed <= usable:
                seats.append(seat)
            else:
                reason = (
                    f"{' and '.join(seat.stages)} take {needed / 1e9:.1f} GB of {usable / 1e9:.1f} on a {seat.kind}"
                )
        if layout.gangs and len(seats) < len(layout.seats):
            return None, reason
        fitting = replace(layout, seats=tuple(seats))
        return (fitting if all(map(fitting.replicas, self.stages.order)) else None), reason

    def predict(self, layout: Layout) -> Prediction:
        """Predict a layout that fits."""
        paces = {
            part: (sum(count / seconds for count, seconds in found), min(seconds for _, seconds in found))
            for part, found in self._paces(layout).items()
        }
        rates = {part: rate for part, (rate, _) in paces.items()}
        bottleneck = min(rates, key=rates.__getitem__)
        rate = rates[bottleneck]
        memory = tuple(self.seat_bytes(seat, layout) for seat in layout.seats)
        busy = min(1.0, rate / rates.get(self.stages.denoiser, rate))
        gangs = [(self.kinds[kind], stage, ranks) for stage, ranks in layout.gangs for kind in layout.gpus(stage)]
        estimated = any(gpus.measured(stage, ranks) is None for gpus, stage, ranks in gangs)
        latency_s = self._latency_s(layout)
        return Prediction(layout, 60 * rate, latency_s, memory, bottleneck, busy, estimated, tuple(paces.values()))

    def _paces(self, layout: Layout) -> dict[str, list[tuple[float, float]]]:
        """Return the replicas of each part of a layout, as counts with the seconds that each takes for a video.

        Helpers beside a transformer take turns with it (`models.gpu_lock`): they wait for one forward each time, and
        the transformers have what is left. With the rates of all transformers, of those beside some helpers, and of
        these helpers, rate = denoise - sum of rate / helpers x beside.
        """
        if layout.fused:
            return {"fused": [(s.count, self._pace_s(self.kinds[s.kind], s.stages, layout)) for s in layout.seats]}
        beside, undisturbed = defaultdict[str, float](float), defaultdict[str, float](float)
        paces, denoise = defaultdict[str, list[tuple[float, float]]](list), list[tuple[float, float]]()
        for seat in layout.seats:
            gpus, helpers = self.kinds[seat.kind], tuple(s for s in seat.stages if s != self.stages.denoiser)
            name, forward_s = " and ".join(helpers), 0.0
            if self.stages.denoiser in seat.stages:
                parallel = layout.parallel_of(self.stages.denoiser)
                denoise_s = gpus.compute_s(self.stages.denoiser, self.load, parallel)
                forward_s = denoise_s * parallel.cfg / self.load.passes
                denoise.append((seat.count / parallel.size, denoise_s))
                beside[name] += seat.count / denoise_s  # a gang waits for what computes beside one of its ranks
            if any(layout.parallel_of(helper).is_gang for helper in helpers):
                decoder = self.stages.decoder  # its gangs wait for what computes beside one of their ranks
                helpers, ranks = layout.beside(decoder), layout.parallel_of(decoder)
                pace_s = self._pace_s(gpus, helpers, layout)
                paces[" and ".join(helpers)].append((seat.count / ranks.size, pace_s))
            elif helpers:
                paces[name].append((seat.count, self._pace_s(gpus, helpers, layout, waiting_s=forward_s)))
                turns = self._turns_s(gpus, helpers, layout)
                undisturbed[name] += seat.count / turns if turns else math.inf
        taken = sum(rate / undisturbed[name] for name, rate in beside.items() if name in undisturbed)
        return {**paces, self.stages.denoiser: [(count, seconds * (1 + taken)) for count, seconds in denoise]}

    def _pace_s(self, gpus: Hardware, stages: Sequence[str], layout: Layout, waiting_s: float = 0.0) -> float:
        """Return the seconds from one video to the next of processes that compute these stages in turn.

        A GPU's file is encoded while the next video computes. While a process works on the host, another may have its
        turn: that much of `waiting_s`, the wait for such a turn, costs nothing.
        """
        turns = self._turns_s(gpus, stages, layout)
        if gpus.kind == CPU:
            return waiting_s + turns
        computing = sum(gpus.compute_s(stage, self.load, layout.parallel_of(stage)) for stage in stages)
        finishing = sum(gpus.stage(stage).finish_s(self.load) for stage in stages)
        return max(computing + max(0.0, waiting_s - (computing - turns)), finishing)

    def _turns_s(self, gpus: Hardware, stages: Sequence[str], layout: Layout) -> float:
        """Return the seconds for which one video's stages occupy a GPU, or a core, alone."""
        seconds = gpus.alone_s if gpus.kind == CPU else gpus.turn_s
        return sum(seconds(stage, self.load, layout.parallel_of(stage)) for stage in stages)

    def _latency_s(self, layout: Layout) -> float:
        """Return the seconds of a single request, each stage on its fastest replica."""
        if layout.fused:
            return CALL_S + min(
                sum(self.kinds[seat.kind].alone_s(stage, self.load) for stage in seat.stages) for seat in layout.seats
            )
        seconds = 0.0
        for stage in layout.stages:
            holders = [self.kinds[seat.kind] for seat in layout.seats if stage in seat.stages]
            handoff_s = holders[0].stage(stage).handoff_bytes(self.load) / holders[0].profile.handoff_bytes_per_s
            parallel = layout.parallel_of(stage)
            seconds += min(gpus.alone_s(stage, self.load, parallel) for gpus in holders) + handoff_s + CALL_S
        return seconds

    def seat_bytes(self, seat: Seat, layout: Layout) -> int:
        """Return the memory that a seat's stages take of one GPU: weights, pools, working memory and CUDA itself."""
        gpus = self.kinds[seat.kind]
        profiles = [gpus.stage(stage, layout.parallel_of(stage)) for stage in seat.stages]
        work, caches = [p.work_bytes(self.load) for p in profiles], [p.cache_bytes for p in profiles]
        if layout.fused:
            replicas = layout.replicas(seat.stages[0])
            output = profiles[-1].output_bytes
            pools = slots_bytes(0, output, REPLICA_WINDOW * replicas, replicas, last=True) + max(caches)
            num_processes, work = 1, [max(work)]
        else:
            in_flight = REPLICA_WINDOW * sum(map(layout.replicas, layout.stages))
            last = gpus.profile.stages[-1].name
            slots = (
                slots_bytes(p.input_bytes, p.output_bytes, in_flight, layout.replicas(p.name), last=p.name == last)
                for p in profiles
            )
            pools, num_processes = sum(slots) + sum(caches), len(profiles)
        context = 0 if gpus.kind == CPU else num_processes * CONTEXT_BYTES
        return int(sum(p.weights_bytes for p in profiles) + sum(work) + pools + context)

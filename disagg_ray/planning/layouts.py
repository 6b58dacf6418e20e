"""Lists the sensible ways to place a model's stages on GPUs, and writes the YAML of one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from types import MappingProxyType

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.planning.parallel import ALONE, spell, to_mapping

CPU = "CPU"
"""The kind of a core, where there is no GPU."""
MAIN_SHARE, HELPER_SHARE = 0.8, 0.2
"""`num_gpus` of a transformer and of all helpers on one GPU: for Ray's bookkeeping, not a limit."""


@dataclass(frozen=True)
class Seat:
    """GPUs of one kind with the same stages, one process for each stage."""

    kind: str
    count: int
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Which stages are on which GPUs; `fused`: in one process there."""

    name: str
    seats: tuple[Seat, ...]
    fused: bool = False
    gangs: tuple[tuple[str, ParallelConfig], ...] = ()
    """The stages whose replicas are several ranks, each on a GPU: the transformer, the decoder or both."""

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage for seat in self.seats for stage in seat.stages))

    def parallel_of(self, stage: str) -> ParallelConfig:
        return dict(self.gangs).get(stage, ALONE)

    def replicas(self, stage: str) -> int:
        return sum(gpus // self.parallel_of(stage).size for gpus in self.gpus(stage).values())

    def beside(self, stage: str) -> tuple[str, ...]:
        """Return the stages that are on any of a stage's GPUs, itself too."""
        return max((seat.stages for seat in self.seats if stage in seat.stages), key=len)

    def gpus(self, stage: str) -> Counter[str]:
        """Return how many GPUs of each kind a stage is on."""
        found: Counter[str] = Counter()
        for seat in self.seats:
            found[seat.kind] += seat.count if stage in seat.stages else 0
        return +found


@dataclass(frozen=True)
class Stages:
    """A model's stages in the order of the graph, the decoder last; all but the denoiser are helpers."""

    order: tuple[str, ...]
    denoiser: str

    @property
    def helpers(self) -> tuple[str, ...]:
        return tuple(stage for stage in self.order if stage != self.denoiser)

    @property
    def decoder(self) -> str:
        return self.order[-1]


def layouts(counts: Mapping[str, int], stages: Stages, gangs: Sequence[ParallelConfig] = ()) -> list[Layout]:
    """Return every sensible layout that uses all GPUs (`counts` by kind), each once.

    Fused; all stages on every GPU; helpers together on some GPUs and the transformer on the others; each helper on
    GPUs of its own; helpers beside a transformer, together on some GPUs or each on another. Helpers fill one kind
    after the other, in any order of kinds. The same with transformers and decoders that are `gangs`, where their ranks
    use up the GPUs; those with `rows` are decoders.
    """
    everywhere = tuple(Seat(kind, count, stages.order) for kind, count in counts.items())
    found = [Layout("fused", everywhere, fused=True)]
    if stages.helpers:
        found.append(Layout("all stages on every GPU", everywhere))
        for kinds in permutations(counts):
            ordered = {kind: counts[kind] for kind in kinds}
            found += _one_beside_each(ordered, stages)
            for num_helpers in range(1, sum(counts.values())):
                found += _with_helpers(ordered, num_helpers, stages)
    apart = [layout for layout in found if not layout.fused]
    shared = [_with_rows(layout, stages, ranks) for ranks in gangs if ranks.rows > 1 for layout in apart]
    found += filter(None, shared)
    apart = [layout for layout in found if not layout.fused]
    found += filter(
        None, [_with_ranks(layout, stages, ranks) for ranks in gangs if ranks.rows == 1 for layout in apart]
    )
    once: dict[object, Layout] = {}
    for layout in found:
        once.setdefault((layout.fused, layout.gangs, frozenset(layout.seats)), layout)
    return list(once.values())


def _with_rows(layout: Layout, stages: Stages, parallel: ParallelConfig) -> Layout | None:
    """Return a layout whose decoders are gangs, with other helpers beside one rank; None if GPUs would be left over.

    None too beside transformers: no two ranks may share a GPU.
    """
    decoder, seats = stages.decoder, list[Seat]()
    for seat in layout.seats:
        if decoder not in seat.stages:
            seats.append(seat)
        elif stages.denoiser in seat.stages or any(len(s.stages) > 1 and decoder in s.stages for s in seats):
            return None
        elif len(seat.stages) > 1 and seat.count > 1:
            seats += [replace(seat, count=1), replace(seat, count=seat.count - 1, stages=(decoder,))]
        else:
            seats.append(seat)
    if decoder == stages.denoiser or any(count % parallel.size for count in layout.gpus(decoder).values()):
        return None
    name = f"{layout.name}, {spell(parallel)}"
    return replace(layout, name=name, seats=tuple(seats), gangs=((decoder, parallel),))


def _with_ranks(layout: Layout, stages: Stages, parallel: ParallelConfig) -> Layout | None:
    """Return a layout whose transformers are gangs; None if GPUs would be left over.

    None too with helpers beside several ranks: Ray could put them all on one GPU, which then had no room for a rank.
    """
    beside = sum(seat.count for seat in layout.seats if stages.denoiser in seat.stages and len(seat.stages) > 1)
    if beside > 1 or any(count % parallel.size for count in layout.gpus(stages.denoiser).values()):
        return None
    name = f"{layout.name}, {spell(parallel)}"
    return replace(layout, name=name, gangs=((stages.denoiser, parallel), *layout.gangs))


def _one_beside_each(counts: Mapping[str, int], stages: Stages) -> Iterator[Layout]:
    """Yield the layout with a transformer on every GPU and each helper beside one of them."""
    if not 1 < len(stages.helpers) <= sum(counts.values()):
        return
    left, seats = dict(counts), []
    for helper in stages.helpers:
        (kind,), left = _take(left, 1)
        seats.append(Seat(kind, 1, tuple(stage for stage in stages.order if stage in (helper, stages.denoiser))))
    seats += _seats(left, (stages.denoiser,))
    yield Layout(f"{stages.denoiser} on all, {', '.join(stages.helpers)} beside one each", tuple(seats))


def _with_helpers(counts: Mapping[str, int], num_helpers: int, stages: Stages) -> Iterator[Layout]:
    """Yield the layouts with helpers on the first `num_helpers` GPUs."""
    taken, left = _take(counts, num_helpers)
    denoise = _seats(left, (stages.denoiser,))
    names = " and ".join(stages.helpers)
    together = (*_seats(taken, stages.helpers), *denoise)
    yield Layout(f"{names} on {num_helpers}, {stages.denoiser} on the others", together)
    if num_helpers == 1 or not set(taken) & set(left):  # else no YAML says which helper goes to which GPU of a kind
        beside = (*_seats(taken, stages.order), *denoise)
        yield Layout(f"{stages.denoiser} on all, {names} beside it on {num_helpers}", beside)
    for many in stages.helpers if 1 < len(stages.helpers) <= num_helpers else ():
        singles, rest, seats = [stage for stage in stages.helpers if stage != many], taken, list[Seat]()
        for stage in singles:
            one, rest = _take(rest, 1)
            seats += _seats(one, (stage,))
        ones = ", ".join(f"{stage} on 1" for stage in singles)
        name = f"{many} on {num_helpers - len(singles)}, {ones}, {stages.denoiser} on the others"
        yield Layout(name, (*seats, *_seats(rest, (many,)), *denoise))


def _seats(counts: Mapping[str, int], stages: tuple[str, ...]) -> list[Seat]:
    return [Seat(kind, count, stages) for kind, count in counts.items()]


def _take(counts: Mapping[str, int], number: int) -> tuple[dict[str, int], dict[str, int]]:
    """Take `number` GPUs, kind after kind; return those taken and those left."""
    taken, left = {}, {}
    for kind, count in counts.items():
        taken[kind] = min(count, number)
        left[kind] = count - taken[kind]
        number -= taken[kind]
    return {k: n for k, n in taken.items() if n}, {k: n for k, n in left.items() if n}


def to_settings(
    layout: Layout, stages: Stages, base: Mapping[str, ParallelConfig] = MappingProxyType({})
) -> dict[str, object]:
    """Return the configuration of a layout, as nested mappings; `base` are the ranks of stages before."""
    settings: dict[str, dict[str, object]] = {}
    for stage in stages.order:
        if layout.fused:
            num_gpus = 0 if {seat.kind for seat in layout.seats} == {CPU} else 1
            settings[stage] = {"replicas": layout.replicas(stage), "num_gpus": num_gpus}
        else:
            settings[stage] = _stage_settings(stage, layout, stages)
        ranks = to_mapping(layout.parallel_of(stage), base.get(stage, ALONE))
        settings[stage] |= {"parallel": ranks} if ranks else {}
    share = {} if layout.fused else {"share_gpu": _share_gpu(layout)}
    return {"fused": layout.fused, "stages": settings, **share}


def _stage_settings(stage: str, layout: Layout, stages: Stages) -> dict[str, object]:
    shares = {seat: _share(stage, seat, layout, stages) for seat in layout.seats if stage in seat.stages}
    parallel = layout.parallel_of(stage)
    if parallel.is_gang:  # which may have ranks in several seats of a kind
        places = [
            (kind, count // parallel.size, min(share for seat, share in shares.items() if seat.kind == kind))
            for kind, count in layout.gpus(stage).items()
        ]
    elif len({seat.kind for seat in layout.seats}) == 1:
        (kind,) = {seat.kind for seat in layout.seats}
        places = [(kind, layout.replicas(stage), min(shares.values()))]
    else:
        places = [(seat.kind, seat.count, share) for seat, share in shares.items()]
    if len(places) == 1:
        ((kind, replicas, share),) = places
        alone = len({seat.kind for seat in layout.seats}) == 1
        where: dict[str, object] = {} if alone else {"accelerator_type": kind}
        return {"replicas": replicas, "num_gpus": share} | where
    groups = {
        f"{kind.lower()}_{place}": {"accelerator_type": kind, "replicas": replicas, "num_gpus": share}
        for place, (kind, replicas, share) in enumerate(places)
    }
    return {"groups": groups}


def _share(stage: str, seat: Seat, layout: Layout, stages: Stages) -> float:
    """Return `num_gpus` of a stage in a seat."""
    if seat.kind == CPU:
        return 0
    main = [name for name in seat.stages if name == stages.denoiser or layout.parallel_of(name).is_gang]
    helpers = [name for name in seat.stages if name not in main]
    if stage in main:
        return MAIN_SHARE if helpers else 1
    share = HELPER_SHARE if main else 1
    return math.floor(1e4 * share / len(helpers)) / 1e4  # rounded down, so that they sum to at most 1


def _share_gpu(layout: Layout) -> list[str]:
    """Return the stages for the key `share_gpu`, which keeps replicas of whole stages on the same GPUs."""
    shared = [seat for seat in layout.seats if len(seat.stages) > 1 and seat.kind != CPU]
    if len(shared) != 1:
        return []
    alone = [stage for stage in shared[0].stages if not layout.parallel_of(stage).is_gang]
    stages = [stage for stage in alone if layout.replicas(stage) == shared[0].count]
    return stages if len(stages) > 1 else []


def to_yaml(settings: Mapping[str, object]) -> str:
    """Return nested mappings as YAML, one line for each stage."""
    lines = []
    for key, value in settings.items():
        if key == "stages" and isinstance(value, Mapping):
            lines += ["stages:", *(f"  {stage}: {_flow(inner)}" for stage, inner in value.items())]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)

"""The ways to lay a model's stages out over GPUs that are worth a thought, and the YAML that asks for one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

CPU = "CPU"
"""The kind of a core where there is no GPU."""
MAIN_SHARE, HELPER_SHARE = 0.8, 0.2
"""Of a GPU that the transformer shares with other stages: Ray's bookkeeping, no limit."""


@dataclass(frozen=True)
class Seat:
    """GPUs of one kind that hold the same stages, a process each."""

    kind: str
    count: int
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Which stages lie on which GPUs; `fused`: in one process there."""

    name: str
    seats: tuple[Seat, ...]
    fused: bool = False

    def replicas(self, stage: str) -> int:
        return sum(seat.count for seat in self.seats if stage in seat.stages)


@dataclass(frozen=True)
class Stages:
    """A model's stages by what they do."""

    order: tuple[str, ...]
    denoiser: str

    @property
    def helpers(self) -> tuple[str, ...]:
        return tuple(stage for stage in self.order if stage != self.denoiser)


def layouts(counts: Mapping[str, int], stages: Stages) -> list[Layout]:
    """Return every sensible way to use all of the GPUs (`counts` by kind), each once.

    Fused; every stage on every GPU; helpers together on some GPUs and the transformer on the others; helpers apart;
    helpers beside a transformer, together on one GPU or on all of a kind, or each on another. Helpers take one kind
    after the other, in any order.
    """
    everywhere = tuple(Seat(kind, count, stages.order) for kind, count in counts.items())
    found = [Layout("fused", everywhere, fused=True), Layout("all stages on every GPU", everywhere)]
    for kinds in permutations(counts):
        found += _one_beside_each(counts, kinds, stages)
        ordered = {kind: counts[kind] for kind in kinds}
        for num_helpers in range(1, sum(counts.values())):
            found += _with_helpers(ordered, num_helpers, stages)
    once: dict[object, Layout] = {}
    for layout in found:
        if stages.helpers or layout.fused:
            once.setdefault((layout.fused, frozenset(layout.seats)), layout)
    return list(once.values())


def _one_beside_each(counts: Mapping[str, int], kinds: Sequence[str], stages: Stages) -> Iterator[Layout]:
    """Yield the layout with a transformer on every GPU and each helper beside one of them."""
    left = {kind: counts[kind] for kind in kinds}
    seats = []
    for helper in stages.helpers if 1 < len(stages.helpers) <= sum(counts.values()) else ():
        (kind,), left = _take(left, 1)
        seats.append(Seat(kind, 1, tuple(stage for stage in stages.order if stage in (helper, stages.denoiser))))
    rest = [Seat(kind, count, (stages.denoiser,)) for kind, count in left.items()]
    if seats:
        yield Layout(f"{stages.denoiser} on all, {', '.join(stages.helpers)} beside one each", (*seats, *rest))


def _with_helpers(counts: Mapping[str, int], num_helpers: int, stages: Stages) -> Iterator[Layout]:
    taken, left = _take(counts, num_helpers)
    denoise = [Seat(kind, count, (stages.denoiser,)) for kind, count in left.items()]
    names = " and ".join(stages.helpers)
    helpers = [Seat(kind, count, stages.helpers) for kind, count in taken.items()]
    yield Layout(f"{names} on {num_helpers}, {stages.denoiser} on the others", (*helpers, *denoise))
    if num_helpers == 1 or not set(taken) & set(left):  # else nothing says on which GPU which helper would lie
        both = [Seat(kind, count, stages.order) for kind, count in taken.items()]
        yield Layout(f"{stages.denoiser} on all, {names} beside it on {num_helpers}", (*both, *denoise))
    for few in stages.helpers if 1 < len(stages.helpers) <= num_helpers else ():
        last = [stage for stage in stages.helpers if stage != few]
        apart, rest = _spread(taken, dict.fromkeys(last, 1), few)
        alone = [Seat(kind, count, (stage,)) for stage, kind, count in apart]
        ones = ", ".join(f"{stage} on 1" for stage in last)
        name = f"{few} on {num_helpers - len(last)}, {ones}, {stages.denoiser} on the others"
        yield Layout(name, (*alone, *rest, *denoise))


def _spread(
    taken: Mapping[str, int], ones: Mapping[str, int], few: str
) -> tuple[list[tuple[str, str, int]], list[Seat]]:
    """Give each of some stages its GPUs, and what is left to another stage."""
    placed, left = [], dict(taken)
    for stage, number in ones.items():
        mine, left = _take(left, number)
        placed += [(stage, kind, count) for kind, count in mine.items()]
    return placed, [Seat(kind, count, (few,)) for kind, count in left.items()]


def _take(counts: Mapping[str, int], number: int) -> tuple[dict[str, int], dict[str, int]]:
    """Take so many GPUs, kind after kind; return those taken and those left."""
    taken, left = {}, {}
    for kind, count in counts.items():
        taken[kind] = min(count, number)
        left[kind] = count - taken[kind]
        number -= taken[kind]
    return {k: n for k, n in taken.items() if n}, {k: n for k, n in left.items() if n}


def to_settings(layout: Layout, stages: Stages) -> dict[str, object]:
    """Return the configuration that asks for a layout, as nested mappings."""
    kinds = {seat.kind for seat in layout.seats}
    if layout.fused:
        on = 0 if kinds == {CPU} else 1
        replicas = layout.replicas(stages.denoiser)
        return {"fused": True, "stages": {stage: {"replicas": replicas, "num_gpus": on} for stage in stages.order}}
    settings = {stage: _stage_settings(stage, layout, stages, mixed=len(kinds) > 1) for stage in stages.order}
    return {"fused": False, "stages": settings, "share_gpu": _sharing(layout)}


def _stage_settings(stage: str, layout: Layout, stages: Stages, *, mixed: bool) -> dict[str, object]:
    seats = [seat for seat in layout.seats if stage in seat.stages]
    shares = {seat: _share(stage, seat, stages) for seat in seats}
    least = min(shares.values())
    if not mixed:
        return {"replicas": layout.replicas(stage), "num_gpus": least}
    if len(seats) == 1:
        return {"replicas": seats[0].count, "num_gpus": least, "accelerator_type": seats[0].kind}
    groups = {
        f"{seat.kind.lower()}_{place}": {
            "accelerator_type": seat.kind,
            "replicas": seat.count,
            "num_gpus": shares[seat],
        }
        for place, seat in enumerate(seats)
    }
    return {"groups": groups}


def _share(stage: str, seat: Seat, stages: Stages) -> float:
    """Return the share of a GPU that a stage asks for where it sits."""
    if seat.kind == CPU:
        return 0
    helpers = [name for name in seat.stages if name != stages.denoiser]
    if stage == stages.denoiser:
        return MAIN_SHARE if helpers else 1
    share = HELPER_SHARE if stages.denoiser in seat.stages else 1
    return math.floor(1e4 * share / len(helpers)) / 1e4  # they are to add up to 1 at most


def _sharing(layout: Layout) -> list[str]:
    """Return the stages that `share_gpu` can keep together: each wholly on the same GPUs as the others."""
    shared = [seat for seat in layout.seats if len(seat.stages) > 1 and seat.kind != CPU]
    if len(shared) != 1:
        return []
    return [stage for stage in shared[0].stages if layout.replicas(stage) == shared[0].count]


def to_yaml(settings: Mapping[str, object]) -> str:
    """Return nested mappings as YAML, one line a stage."""
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

"""Replicas of several ranks in a plan: which are worth a look, and how fast and large they are if not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.planning.profile import StageProfile

ALONE = ParallelConfig()
CFG_SPEEDUP = 1.99
"""Of two ranks with one branch of guidance each, on two H100 of one host; at least (docs/performance.md)."""
ULYSSES_SPEEDUP = 1.81
"""Of two ranks that share the tokens, on two H100 of one host, at least; again for each doubling."""
ROWS_SPEEDUP = 1.87
"""Of two ranks that share the rows of a decode, on two H200 of one host, at least; again for each doubling."""
NODE_GPUS = 8
"""Most ranks to look at: those of one host."""


def spell(parallel: ParallelConfig) -> str:
    """Return a gang's numbers in words, as `cfg 2, ulysses 4`."""
    parts = (name if value is True else f"{name} {value}" for name, value in to_mapping(parallel).items())
    return ", ".join(parts) or "one rank"


def to_mapping(parallel: ParallelConfig, base: ParallelConfig = ALONE) -> dict[str, object]:
    """Return what the key `parallel` has to say where `base` stood before: nothing of what is the default in both."""
    return {
        name: value
        for name, value in vars(parallel).items()
        if (value, getattr(base, name)) != (getattr(ALONE, name),) * 2
    }


def speedup(parallel: ParallelConfig) -> float:
    """Return how many times as fast as one GPU a gang is with a guided request, as estimated."""
    shares: float = ULYSSES_SPEEDUP ** math.log2(parallel.num_shards) * ROWS_SPEEDUP ** math.log2(parallel.rows)
    return shares * (CFG_SPEEDUP if parallel.cfg > 1 else 1.0)


def estimate(alone: StageProfile, parallel: ParallelConfig) -> StageProfile:
    """Return what one rank of a gang would measure, from a measurement on one GPU.

    Working memory counts whole, although ranks that share tokens or rows hold less.
    """
    factor = speedup(parallel)
    points = (replace(p, compute_s=p.compute_s / factor, turn_s=p.turn_s / factor) for p in alone.points)
    weights = parallel.held(alone.weights_bytes, alone.num_blocks)
    return replace(alone, weights_bytes=weights, points=tuple(points), parallel=parallel)


def candidates(most: int, num_heads: int, *, guided: bool) -> Iterator[ParallelConfig]:
    """Yield every gang of 2 to `most` ranks whose tokens and heads go by halves; the smallest first.

    `num_heads` of a model that is not known is 0. A request without guidance would leave half of a cfg gang idle.
    """
    found = [
        ParallelConfig(cfg, ulysses)
        for cfg in ((1, 2) if guided else (1,))
        for ulysses in (1, 2, 4, 8)
        if 2 <= cfg * ulysses <= min(most, NODE_GPUS) and num_heads % ulysses == 0
    ]
    yield from sorted(found, key=lambda parallel: (parallel.size, parallel.ulysses))


def row_candidates(most: int) -> Iterator[ParallelConfig]:
    """Yield the gangs of 2 to `most` ranks that share a decode's rows and leave GPUs for other stages."""
    yield from (ParallelConfig(rows=rows) for rows in (2, 4) if rows < most)


def choose(
    found: Iterable[ParallelConfig], why_not: Callable[[ParallelConfig], str]
) -> tuple[list[ParallelConfig], list[str]]:
    """Return those that a configuration can have, each with shard_weights too where that can be had; and a note.

    `why_not` returns the reason that keeps one from being had, or nothing. The note has that of the first.
    """
    taken, reasons = list[ParallelConfig](), dict[str, str]()
    for parallel in found:
        if reason := why_not(parallel):
            reasons[spell(parallel)] = reason
            continue
        sharded = replace(parallel, shard_weights=True)
        taken += [parallel, *([] if why_not(sharded) else [sharded])]
    return taken, [f"left out: {'; '.join(reasons)}: {next(iter(reasons.values()))}"] if reasons else []

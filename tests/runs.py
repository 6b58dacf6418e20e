"""Finished runs that never ran, for tests of what is made of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from disagg_ray.batch.manifest import MANIFEST
from disagg_ray.batch.records import Record
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import StageTiming

BEGAN = 1_800_000_000.0
SECONDS = {"encoder": (0.05, 0.01), "transformer": (6.0, 0.02), "decoder": (1.2, 0.4)}
"""Computing and publishing, by stage."""
PULL_S = {"encoder": 0.0, "transformer": 0.02, "decoder": 0.03}

Work = tuple[str, tuple[StageTiming, ...]]


def simulate(num_requests: int, replicas: Mapping[str, int], *, began: float = BEGAN, seed: int = 0) -> list[Work]:
    """Return what a run through these replicas leaves: each request goes to the one that is free first."""
    random_ = random.Random(seed)
    free = {stage: [began] * count for stage, count in replicas.items()}
    done = [began] * num_requests
    timings: list[list[StageTiming]] = [[] for _ in range(num_requests)]
    for stage in replicas:
        for index in sorted(range(num_requests), key=done.__getitem__):
            which = min(range(len(free[stage])), key=free[stage].__getitem__)
            factor, (compute_s, publish_s) = random_.uniform(0.7, 1.3), SECONDS[stage]
            ready, pull_s = done[index], PULL_S[stage]
            started = max(free[stage][which], ready + pull_s)
            timing = StageTiming(
                stage, f"{stage}-{which}", started - pull_s - ready, pull_s, started, compute_s * factor,
                publish_s, 4_000_000, "tcp", 0, attempts=1 + (random_.random() < 0.02),
            )  # fmt: skip
            timings[index].append(timing)
            done[index] = free[stage][which] = started + timing.compute_s + publish_s
    return [(f"video-{index:04}", tuple(of_one)) for index, of_one in enumerate(timings)]


REQUEST = ResolvedRequest("", "", "", 64, 96, 9, 30, 5.0, None, 7, 16, "mp4", 0, {})


def record(work: Work, prompt: str, **changes: object) -> Record:
    """Return a done request's line of the manifest."""
    name, stages = work
    ended = max(timing.started + timing.compute_s + timing.publish_s for timing in stages)
    began = min(timing.started - timing.pull_s - timing.queue_s for timing in stages)
    done = Record(
        name, "done", "", "", ended, f"{name}.mp4", request=replace(REQUEST, id=name, prompt=prompt),
        seconds=ended - began, stages=stages,
    )  # fmt: skip
    return replace(done, **changes)  # type: ignore[arg-type]


def write_manifest(folder: Path, records: Sequence[Record]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))

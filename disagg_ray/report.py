"""What a person reads about finished work."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from disagg_ray.result import Result
from disagg_ray.service import Snapshot
from disagg_ray.units import human_bytes


def print_result(result: Result, weights: Mapping[str, Mapping[str, int]], pools: Mapping[str, int]) -> None:
    """Print where a request's time went, stage by stage, and what each replica holds.

    `weights` are bytes by component, by replica (or by stage where everything runs in one process); `pools` bytes by
    replica.
    """
    request = result.request
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=(
        f"request {request.id}: {request.width}x{request.height}, {request.num_frames} frames, "
        f"{request.num_inference_steps} steps, seed {request.seed}, {result.seconds:.2f} s"
    ))  # fmt: skip
    table.add_column("replica")
    for column in ("queue s", "pull s", "compute s", "publish s", "pulled"):
        table.add_column(column, justify="right")
    table.add_column("route")
    table.add_column("pool", justify="right")
    table.add_column("GPU peak", justify="right")
    table.add_column("weights")
    for timing in result.stages:
        seconds = (timing.queue_s, timing.pull_s, timing.compute_s, timing.publish_s)
        held = weights.get(timing.replica) or weights.get(timing.stage) or {}
        table.add_row(
            timing.replica if timing.replica != "local" else timing.stage,
            *(f"{value:.3f}" for value in seconds),
            human_bytes(timing.pulled_bytes),
            timing.route,
            human_bytes(pools[timing.replica]) if timing.replica in pools else "-",
            human_bytes(timing.peak_bytes) if timing.peak_bytes else "-",
            ", ".join(f"{name} {human_bytes(nbytes)}" for name, nbytes in held.items()),
        )
    _print(table)


def print_standing(snapshots: Mapping[str, Snapshot | None]) -> None:
    """Print how standing pipelines are; None: the supervisor does not answer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "model", "state", "stages: ready/busy of wanted", "queue", "age", "GPU memory", "address"):
        table.add_column(column)
    for name, shown in snapshots.items():
        if shown is None:
            table.add_row(name, "-", "restarting")
            continue
        stages = ", ".join(f"{s.stage} {s.ready}/{s.busy} of {s.wanted}" for s in shown.stages)
        waiting = shown.queued + sum(s.waiting for s in shown.stages)
        gpu_bytes = sum(s.gpu_bytes for s in shown.stages)
        age = f"{(time.time() - shown.began) / 60:.0f} min"
        held = human_bytes(gpu_bytes) if gpu_bytes else "-"
        table.add_row(name, shown.config.model.path, shown.state, stages, str(waiting), age, held, shown.address)
    _print(table)


def standing_to_json(snapshots: Mapping[str, Snapshot | None]) -> str:
    """Return how standing pipelines are, as a JSON list; a supervisor that does not answer is `restarting`."""

    def describe(name: str, shown: Snapshot | None) -> dict[str, object]:
        if shown is None:
            return {"name": name, "state": "restarting"}
        fields = {key: value for key, value in asdict(shown).items() if key != "config"}
        return fields | {"model": shown.config.model.path, "age_s": time.time() - shown.began}

    return json.dumps([describe(name, shown) for name, shown in snapshots.items()], indent=2)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no width of its own
    console.print(table)

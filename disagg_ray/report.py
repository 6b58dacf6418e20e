"""What a person reads about finished work."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from disagg_ray.result import Result
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
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no width of its own
    console.print(table)

"""What a person reads about finished work."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from disagg_ray.plan import Plan
from disagg_ray.profile import Profile
from disagg_ray.result import Result


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


def print_profile(profile: Profile) -> None:
    """Print what was measured of each stage, a line for each request."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=(
        f"{profile.model} on {profile.hardware}, handoffs {human_bytes(profile.handoff_bytes_per_s)} a second"
    ))  # fmt: skip
    for column in ("stage", "size", "passes", "compute s", "file s", "weights", "work", "handoff", "load s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in profile.stages:
        for point in stage.points:
            load = point.load
            table.add_row(
                stage.name, f"{load.width}x{load.height}x{load.num_frames}", str(load.passes),
                f"{point.compute_s:.3f}", f"{point.finish_s:.3f}", human_bytes(stage.weights_bytes),
                human_bytes(point.work_bytes), human_bytes(point.handoff_bytes), f"{stage.load_s:.1f}",
            )  # fmt: skip
    _print(table)


def print_plan(plan: Plan, num_requests: int | None, most: int = 12) -> None:
    """Print the best layouts, fused whatever its rank, and those that do not fit."""
    load = plan.load
    title = f"{load.width}x{load.height}, {load.num_frames} frames, {load.passes} passes"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=title)
    for column in ("layout", "videos/min", "of fused", "alone s", "GB of a GPU", "busy", "limited by"):
        table.add_column(column, justify="left" if column in ("layout", "limited by") else "right")
    if num_requests:
        table.add_column(f"{num_requests} done in s", justify="right")
    for place, prediction in enumerate(plan.predictions):
        if place < most or prediction.layout.fused:
            table.add_row(
                prediction.layout.name, f"{prediction.per_minute:.2f}",
                f"{prediction.per_minute / plan.fused.per_minute:.2f}" if plan.fused else "-",
                f"{prediction.latency_s:.2f}", f"{max(prediction.gpu_bytes) / 1e9:.1f}", f"{prediction.busy:.0%}",
                prediction.bottleneck, *([f"{prediction.makespan_s(num_requests):.1f}"] if num_requests else []),
            )  # fmt: skip
    for layout, reason in plan.misfits[:3]:
        table.add_row(layout.name, "-", "-", "-", "-", "-", f"no room: {reason}")
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no width of its own
    console.print(table)


def human_bytes(nbytes: float) -> str:
    """Return bytes with a decimal unit, as 8.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"

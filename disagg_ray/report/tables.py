"""Prints results, profiles, plans and services, and writes the report of a batch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from disagg_ray.batch.manifest import MANIFEST, read_manifest
from disagg_ray.batch.records import Record
from disagg_ray.batch.summary import Tally, name_bottleneck
from disagg_ray.errors import OutputError
from disagg_ray.media.output import atomic_file
from disagg_ray.planning.parallel import spell
from disagg_ray.planning.plan import Plan
from disagg_ray.planning.profile import Profile
from disagg_ray.report.drawing import draw
from disagg_ray.report.page import Sheet, made_by, render
from disagg_ray.report.timeline import PHASES, Timeline, entitle, is_whole, lay_out, shares
from disagg_ray.report.trace import to_trace
from disagg_ray.result import Result
from disagg_ray.service.protocol import Snapshot
from disagg_ray.text import human_bytes, human_size, medium

PERCENTILES = (50, 90, 99, 100)
MOST_LAYOUTS = 12
"""Of a plan, the best to print whatever they are."""


def print_result(result: Result, weights: Mapping[str, Mapping[str, int]], pools: Mapping[str, int]) -> None:
    """Print a request's seconds by stage, and the memory of each replica.

    `weights` are bytes by component, by replica (or by stage where everything runs in one process); `pools` bytes by
    replica.
    """
    request = result.request
    title = (
        f"request {request.id}: {human_size(request.width, request.height, request.num_frames)}, "
        f"{request.num_inference_steps} steps, seed {request.seed}, {result.seconds:.2f} s"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("seconds", no_wrap=True)
    for column in ("queue", "pull", "compute", "publish", "encode", "pulled"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("route", no_wrap=True)
    held = []
    for timing in result.stages:
        name = entitle(timing.replica if timing.replica != "local" else timing.stage, timing)
        seconds = (timing.queue_s, timing.pull_s, timing.compute_s, timing.publish_s, timing.encode_s)
        table.add_row(name, *(f"{value:.3f}" for value in seconds), human_bytes(timing.pulled_bytes), timing.route)
        parts = dict(weights.get(timing.replica) or weights.get(timing.stage) or {})
        parts |= {"pool": pools[timing.replica]} if timing.replica in pools else {}
        parts |= {"GPU peak": timing.peak_bytes} if timing.peak_bytes else {}
        held.append(f"{name} holds " + ", ".join(f"{part} {human_bytes(nbytes)}" for part, nbytes in parts.items()))
    _print(title, table, *held)


def print_profile(profile: Profile) -> None:
    """Print a profile, one line for each stage and request."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=(
        f"{profile.model} on {profile.hardware}, speed={profile.speed}, "
        f"{', '.join(map(' '.join, profile.versions.items()))}, "
        f"handoffs {human_bytes(profile.handoff_bytes_per_s)} a second"
    ))  # fmt: skip
    for column in ("stage", "size", "passes", "compute s", "turn s", "file s", "weights", "work", "handoff", "load s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in (*profile.stages, *profile.gangs):
        name = f"{stage.name}, {spell(stage.parallel)}" if stage.parallel.is_gang else stage.name
        for point in stage.points:
            load = point.load
            table.add_row(
                name, human_size(load.width, load.height, load.num_frames), str(load.passes),
                f"{point.compute_s:.3f}", f"{point.turn_s:.3f}", f"{point.finish_s:.3f}",
                human_bytes(stage.weights_bytes),
                human_bytes(point.work_bytes), human_bytes(point.handoff_bytes), f"{stage.load_s:.1f}",
            )  # fmt: skip
    _print(table)


def print_plan(plan: Plan, num_requests: int | None) -> None:
    """Print the best layouts, fused and the best with each kind of gang at any place, and some that do not fit."""
    load = plan.load
    title = f"{human_size(load.width, load.height, load.num_frames)}, {load.passes} passes"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=title)
    pace = f"{medium(load.num_frames)}s/min"
    for column in ("layout", pace, "of fused", "alone s", "GB of a GPU", "busy", "limited by"):
        table.add_column(column, justify="left" if column in ("layout", "limited by") else "right")
    if num_requests:
        table.add_column(f"{num_requests} done in s", justify="right")
    shown: set[object] = set()
    for place, prediction in enumerate(plan.predictions):
        layout = prediction.layout
        if place < MOST_LAYOUTS or layout.fused or layout.gangs not in shown:
            shown.add(layout.gangs)
            table.add_row(
                f"{layout.name}{' *' if prediction.estimated else ''}", f"{prediction.per_minute:.2f}",
                f"{prediction.per_minute / plan.fused.per_minute:.2f}" if plan.fused else "-",
                f"{prediction.latency_s:.2f}", f"{max(prediction.gpu_bytes) / 1e9:.1f}", f"{prediction.busy:.0%}",
                prediction.bottleneck, *([f"{prediction.makespan_s(num_requests):.1f}"] if num_requests else []),
            )  # fmt: skip
    for layout, reason in plan.misfits[:3]:
        table.add_row(layout.name, "-", "-", "-", "-", "-", f"no room: {reason}")
    _print(table)


def print_services(snapshots: Mapping[str, Snapshot | str]) -> None:
    """Print the state of services; a text replaces a service whose supervisor does not answer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "model", "state", "stages: ready/busy of wanted", "queue", "age", "GPU memory", "address"):
        table.add_column(column)
    gangs: list[str] = []
    for name, shown in snapshots.items():
        if isinstance(shown, str):
            table.add_row(name, "-", shown)
            continue
        stages = ", ".join(f"{s.stage} {s.ready}/{s.busy} of {s.wanted}{_sizes(shown, s.stage)}" for s in shown.stages)
        waiting = shown.queued + sum(s.waiting for s in shown.stages)
        gpu_bytes = sum(s.gpu_bytes for s in shown.stages)
        age = f"{shown.age_s / 60:.0f} min"
        held = human_bytes(gpu_bytes) if gpu_bytes else "-"
        table.add_row(name, shown.config.model.path, shown.state, stages, str(waiting), age, held, shown.address)
        gangs += [f"{name} {info.name}: {'; '.join(map(str, info.ranks))}" for info in shown.replicas if info.ranks]
    _print(table, *gangs)


def _sizes(snapshot: Snapshot, stage: str) -> str:
    """Return how many ranks a stage's replicas have, where some have several."""
    groups = snapshot.config.stages[stage].replica_groups.values()
    sizes = sorted({group.parallel.size for group in groups})
    return f" ({' or '.join(map(str, sizes))} ranks each)" if sizes[-1] > 1 else ""


def services_to_json(snapshots: Mapping[str, Snapshot | str]) -> str:
    """Return the state of services as a JSON list."""

    def describe(name: str, shown: Snapshot | str) -> dict[str, object]:
        if isinstance(shown, str):
            return {"name": name, "state": shown}
        fields = {key: value for key, value in asdict(shown).items() if key != "config"}
        return fields | {"model": shown.config.model.path}

    return json.dumps([describe(name, shown) for name, shown in snapshots.items()], indent=2)


def _print(*shown: Table | str) -> None:
    console = Console(markup=False)  # an id may hold brackets
    if not console.is_terminal:
        console.width = 160  # a log has no width of its own
    for each in shown:
        console.print(each)


def write_report(folder: Path, output: Path) -> tuple[Path, ...]:
    """Print the results of a finished run, and write report.html, timeline.svg and trace.json; return their paths.

    Raises:
        OutputError: there is no manifest in the folder, it is empty, or the output cannot be written.
    """
    records = _read(folder)
    done = [record for record in records if record.status == "done"]
    timeline = lay_out((record.id, record.stages) for record in done)
    notes, busy, latency = _notes(records, timeline), _busy(timeline), _latencies(done)
    print("\n".join(notes))
    _print_sheet(busy)
    _print_sheet(latency)
    title = f"disagg_ray: {folder.resolve().name}"
    words = [f"{title}: {notes[0]}", *notes[1:], *_in_words(busy), *_in_words(replace(latency, rows=latency.rows[:1]))]
    videos = os.path.relpath(folder.resolve(), output.resolve())
    page = render(title, notes, (busy, latency), draw(timeline), records, videos)
    contents = {"report.html": page, "timeline.svg": draw(timeline, words).encode(), "trace.json": to_trace(timeline)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with atomic_file(output / name) as sink:
                sink.write(content)
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} cannot be written: {error}") from error
    return tuple(output / name for name in contents)


def _read(folder: Path) -> list[Record]:
    """Return the last record of each request, without incomplete timings."""
    if not (folder / MANIFEST).exists():
        raise OutputError(f"OUT: {str(folder)!r} has no {MANIFEST}; give the --output-dir of a run")
    last = {record.id: record for record in read_manifest(folder)}
    if not last:
        raise OutputError(f"{str(folder / MANIFEST)!r} records no request; give the --output-dir of a finished run")
    return [replace(record, stages=tuple(filter(is_whole, record.stages))) for record in last.values()]


def _notes(records: Sequence[Record], timeline: Timeline) -> list[str]:
    """Return counts, throughput and bottleneck as lines of text."""
    tally, made = Tally(), made_by(records)
    for record in records:
        tally.add(record)
    counts = f"{tally.done} done, {tally.failed} failed, {tally.retried} retried"
    if not timeline.lanes:
        return [counts]
    pace = 60 * tally.done / timeline.seconds
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(timeline.began))
    pauses = " without pauses" if timeline.pauses else ""
    note = f"{counts}; began {began}, {timeline.seconds:.1f} s{pauses}, {pace:.2f} {made}s a minute"
    return [note, *name_bottleneck(tally.shares(timeline.num_replicas, timeline.seconds), made)]


def _busy(timeline: Timeline) -> Sheet:
    ranks, gpu_seconds = timeline.num_ranks, timeline.gpu_seconds
    has_gangs, has_gpus = ranks != timeline.num_replicas, any(gpu_seconds.values())
    rows = tuple(
        (
            stage, str(timeline.num_replicas[stage]), *([str(ranks[stage])] if has_gangs else []),
            f"{100 * (of['compute'] + of['publish']):.0f} %", *(f"{100 * of[phase]:.1f} %" for phase in PHASES),
            f"{100 * (1 - sum(of.values())):.1f} %", *([f"{gpu_seconds[stage]:.1f}"] if has_gpus else []),
        )
        for stage, of in shares(timeline).items()
    )  # fmt: skip
    columns = ("stage", "replicas", *(["ranks"] if has_gangs else []), "busy", *PHASES, "idle")
    return Sheet("Where the replicas' time went", (*columns, *(["GPU seconds"] if has_gpus else [])), rows)


def _latencies(records: Sequence[Record]) -> Sheet:
    """Return percentiles of a request's seconds, in all and by stage; pulls count even if they overlap computing."""
    seconds = {"seconds a request": [record.seconds for record in records if record.seconds is not None]}
    for timing in (timing for record in records for timing in record.stages):
        parts = {
            "wait": timing.queue_s,
            "pull": timing.pull_s,
            "compute": timing.compute_s,
            "publish": timing.publish_s,
        }
        for phase, value in parts.items():
            seconds.setdefault(f"{timing.stage} {phase}", []).append(value)
    rows = tuple(
        (name, *(f"{value:.3f}" for value in np.percentile(values, PERCENTILES)))
        for name, values in seconds.items()
        if values
    )
    return Sheet("Latency", ("seconds", *(f"p{p}" if p < 100 else "max" for p in PERCENTILES)), rows)


def _in_words(sheet: Sheet) -> list[str]:
    return [
        f"{row[0]}: " + ", ".join(f"{column} {cell}" for column, cell in zip(sheet.columns[1:], row[1:], strict=True))
        for row in sheet.rows
    ]


def _print_sheet(sheet: Sheet) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=sheet.title, title_justify="left")
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in sheet.rows:
        table.add_row(*row)
    _print(table)

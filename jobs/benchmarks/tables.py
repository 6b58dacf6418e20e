"""What splitting gives: latency, throughput, memory and start of stock, fused and every split, in the same run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import subplots
from benchmarks.stock import Stock
from benchmarks.ways import STOCK, Bench, Options, Row, measure_stock, measure_way

from disagg_ray.config.load import load_config
from disagg_ray.planning.layouts import CPU, Layout, Seat, Stages

TUNED = f"{STOCK}, the same options by hand"
WHATS = ("latency", "throughput", "memory", "start")


def open_bench(options: Options) -> Bench:
    config = load_config(options.config, *options.overrides)
    denoiser = next(name for name, stage in config.stages.items() if "denoise" in stage.blocks)
    return Bench(options, config, Stages(tuple(config.stages), denoiser))


def measure(options: Options) -> list[Row]:
    """Measure every way, uncapped and then, for memory, under each cap."""
    bench = open_bench(options)
    if set(options.whats) - {"memory"} or not options.caps:
        if bench.wants(STOCK):
            exact = load_config(options.config, *options.overrides, "speed=exact")
            bench.row(STOCK, None, lambda: measure_stock(bench, Stock(exact, options.format)))
        if bench.config.speed == "fast" and bench.wants(TUNED):
            tuned = Stock(bench.config, options.format, is_tuned=True)
            bench.row(TUNED, None, lambda: measure_stock(bench, tuned))
        for way in bench.ways():
            bench.row(way.name, None, lambda way=way: measure_way(bench, way))
    if options.caps:
        measure_caps(bench)
    return bench.rows


def measure_caps(bench: Bench) -> None:
    """Learn each stage's peak where nothing is capped, then give every way as much of each GPU as the cap allows."""
    options = bench.options
    kind = "GPU" if bench.on_gpu else CPU
    together = Layout("all stages on one GPU", (Seat(kind, 1, bench.stages.order),))
    alone = replace(options, cells=options.cells[:1], rounds=(0,), whats=("latency",), repeats=1, num_gpus=1)
    first = Bench(alone, bench.config, bench.stages)
    first.row(together.name, None, lambda: measure_way(first, together))
    bench.rows += first.rows
    found = next((row for row in first.rows if "peak_bytes" in row), None)
    for cap_gib in options.caps if found else ():
        for way in bench.ways():
            measure_capped(bench, way, found["peak_bytes"], found["weights_bytes"], cap_gib)
        measure_capped_stock(bench, sum(found["weights_bytes"].values()), cap_gib)  # the slowest, last


def measure_capped_stock(bench: Bench, weights: int, cap_gib: float) -> None:
    """Measure stock under a cap, all on the GPU where its weights fit, and by each way to offload them."""
    cap = int(cap_gib * 2**30)
    for offload in ("", *bench.options.offloads):
        name = f"{STOCK}, {offload} offload" if offload else f"{STOCK}, all on the GPU"
        if not offload and weights > cap:
            bench.add({"way": name, "cap_gib": cap_gib, "error": f"the weights alone take {weights / 1e9:.1f} GB"})
        elif bench.wants(name):
            stock = Stock(bench.config, bench.options.format, offload, cap)
            bench.row(name, cap_gib, lambda stock=stock: measure_stock(bench, stock))


def measure_capped(
    bench: Bench, way: Layout, peaks: Mapping[str, int], weights: Mapping[str, int], cap_gib: float
) -> None:
    """Measure a way under a cap for each GPU: processes that share one share the cap, each by its peak.

    Where that is too little, the largest stages keep their weights on the host, as many as it takes.
    """
    cap = int(cap_gib * 2**30)
    offloaded: list[str] = []
    for stage in sorted(peaks, key=weights.__getitem__, reverse=True):
        if way.fused or max(add_up(peaks, way).values()) <= cap:
            break
        offloaded.append(stage)
        visiting = weights[stage] // (10 if stage == bench.stages.denoiser else 4)  # word embeddings are one layer
        peaks = {**peaks, stage: peaks[stage] - weights[stage] + visiting}
    needed = add_up(peaks, way)
    name = f"{way.name}, {' and '.join(offloaded)} offloaded" if offloaded else way.name
    fullest = max(needed, key=needed.__getitem__)
    if way.fused or needed[fullest] > cap:
        taken = f"{' and '.join(fullest.stages)} take {needed[fullest] / 1e9:.1f} GB"
        said = "as stock, all on the GPU" if way.fused else taken
        bench.add({"way": name, "cap_gib": cap_gib, "error": f"no room: {said}"})
        return
    overrides = [f"stages.{stage}.offload=group" for stage in offloaded]
    for stage in bench.stages.order if bench.on_gpu else ():
        most = min(int(peaks[stage] * cap / needed[seat]) for seat in way.seats if stage in seat.stages)
        overrides.append(f"stages.{stage}.max_vram_bytes={most}")
    bench.row(name, cap_gib, lambda: measure_way(bench, way, *overrides))


def add_up(peaks: Mapping[str, int], way: Layout) -> dict[Seat, int]:
    return {seat: sum(peaks[stage] for stage in seat.stages) for seat in way.seats}


def tables(rows: Sequence[Row]) -> str:
    """Return what was measured as Markdown, each cell's baseline beside it."""
    lines = [f"| way | | alone s | of stock | {made(rows)}/min | of stock | busy |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        name = row["way"] + (f" under {row['cap_gib']:g} GiB" if row.get("cap_gib") else "")
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | |")
        elif "cell" in row:
            cells = [show(row.get("latency_s")), show(ratio(row, rows, "latency_s")), show(row.get("per_minute")),
                     show(ratio(row, rows, "per_minute")), show(row.get("busy"))]  # fmt: skip
            lines.append(f"| {name} | {row['cell']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def made(rows: Sequence[Row]) -> str:
    """Return what was made, in the plural."""
    return str(next((row["makes"] for row in rows if "makes" in row), "video")) + "s"


def ratio(row: Row, rows: Sequence[Row], key: str) -> float | None:
    """Return a row's value over the best that stock does in the same cell and under the same cap."""
    bases = [other[key] for other in rows if other["way"].startswith(STOCK) and other.get(key)
             and (other.get("cell"), other.get("cap_gib")) == (row["cell"], row.get("cap_gib"))]  # fmt: skip
    if not bases or not row.get(key):
        return None
    best = min(bases) if key == "latency_s" else max(bases)
    return float(row[key] / best)


def show(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def report(rows: Sequence[Row], path: Path) -> None:
    """Plot, and print the tables."""
    plot(rows, path)
    print("\n" + tables(rows))


def plot(rows: Sequence[Row], path: Path) -> None:
    panels = {"per_minute": f"{made(rows)} a minute", "latency_s": "one request alone, s",
              "ready_s": "from nothing to ready, s", "peak_bytes": "peak memory of a process on a GPU, GB"}  # fmt: skip
    drawn = {key: values for key in panels if (values := plotted(rows, key))}
    if not drawn:
        return
    figure, axes = subplots(len(drawn), 1, figsize=(12, 3.8 * len(drawn)), squeeze=False)
    for (key, values), axis in zip(drawn.items(), axes[:, 0], strict=True):
        bars(axis, values)
        axis.set(title=panels[key])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plotted(rows: Sequence[Row], key: str) -> dict[str, dict[str, float]]:
    """Return what rows hold under a key, by way and then by cell or stage; nothing where all is 0."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get(key):
            name = row["way"] + (f" under {row['cap_gib']:g} GiB" if row.get("cap_gib") else "")
            given = row[key] if isinstance(row[key], dict) else {row["cell"]: row[key]}
            found = {part: value / (1e9 if key == "peak_bytes" else 1) for part, value in given.items()}
            values.setdefault(textwrap.fill(name, 20), {}).update(found)
    return values if any(value for group in values.values() for value in group.values()) else {}


def bars(axis: Any, values: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a bar for each entry of each group, with its number on it."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    for colour, name in enumerate(names):
        at, heights, widths = [], [], []
        for place, group in enumerate(values.values()):
            if name in group:
                widths.append(0.8 / len(group))
                at.append(place + widths[-1] * (list(group).index(name) - (len(group) - 1) / 2))
                heights.append(group[name])
        axis.bar_label(axis.bar(at, heights, widths, label=name, color=f"C{colour}"), fmt="%.3g", fontsize=7)
    axis.set_xticks(range(len(values)), list(values), fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.15)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

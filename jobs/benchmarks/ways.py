"""Starts stock diffusers or a layout once, and measures everything that is asked for on it.

What fails or comes too late is a row that says so.
"""

from __future__ import annotations

import itertools
import json
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.stock import PROMPT, Cell, Stock, StockPipelines, per_minute

from disagg_ray import Pipeline, Request, Result
from disagg_ray.config.load import load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.errors import Cancelled, DisaggError
from disagg_ray.planning.layouts import CPU, Layout, Stages, layouts, to_settings, to_yaml

STOCK = "stock diffusers"
VIDEO_S = 600.0
"""Until a video must be finished."""
TAKES = itertools.count()
"""Makes every prompt a new one: no encoder's cache helps."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    config: str
    overrides: tuple[str, ...]
    whats: tuple[str, ...]
    num_gpus: int
    cells: tuple[Cell, ...]
    rounds: tuple[int, ...]
    """Videos of each pipeline or transformer that are timed, by cell."""
    repeats: int
    """Requests alone."""
    format: str
    only: tuple[str, ...]
    """Words of the ways' names; none: all."""
    caps: tuple[float, ...]
    """GiB of a GPU, for memory."""
    offloads: tuple[str, ...]
    """Of stock under a cap: each is measured."""
    gangs: tuple[ParallelConfig, ...]
    """Of transformers: each split is measured with them too, where their ranks use up the GPUs."""
    log: Path
    """Gets each row as it comes, should the run be cut off."""
    ends: float
    """Monotonic time after which nothing more is begun."""


@dataclass
class Bench:
    options: Options
    config: Config
    stages: Stages
    rows: list[Row] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return any(stage.torch_device == "cuda" for stage in self.config.stages.values())

    def ways(self) -> list[Layout]:
        """Return fused and the splits; of alike ones those that give helpers no more than half of the GPUs."""
        count = self.options.num_gpus
        found = layouts({"GPU" if self.on_gpu else CPU: count}, self.stages, self.options.gangs)
        few = [way for way in found if way.gpus(self.stages.denoiser).total() * 2 >= count]
        return [way for way in few if self.wants(way.name)]

    @property
    def least_steps(self) -> int:
        """Steps of a request that warms up."""
        return self.config.model.traits.least_steps

    @property
    def saturates(self) -> bool:
        return bool({"throughput", "memory"} & set(self.options.whats))

    def cells(self) -> Iterator[tuple[Cell, int]]:
        """Yield what to measure, with the rounds, as long as there is time."""
        for cell, rounds in zip(self.options.cells, self.options.rounds, strict=True):
            if self.options.whats != ("start",) and time.monotonic() < self.options.ends:
                yield cell, rounds

    def wants(self, name: str) -> bool:
        return not self.options.only or any(word in name for word in self.options.only)

    def row(self, name: str, cap_gib: float | None, measure: Callable[[], Iterator[Row]]) -> None:
        """Add a way's rows; one that fails or comes too late says so."""
        makes = self.config.model.traits.makes
        about: Row = {"way": name, "gpus": self.options.num_gpus, "cap_gib": cap_gib, "makes": makes}
        if time.monotonic() > self.options.ends:
            self.add(about | {"error": "left out: no time"})
            return
        try:
            num_cells = [self.add(about | row) for row in measure()].count(True)
            if self.options.whats != ("start",) and num_cells < len(self.options.cells):
                self.add(about | {"error": f"left out: no time for {len(self.options.cells) - num_cells} cells"})
        except Exception as error:  # noqa: BLE001 - a losing or failing way is a row, the others go on
            self.add(about | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]})

    def add(self, row: Row) -> bool:
        """Return whether the row is of a cell."""
        self.rows.append(row)
        print(line(row), flush=True)
        with self.options.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return "cell" in row


def measure_stock(bench: Bench, stock: Stock) -> Iterator[Row]:
    options = bench.options
    with StockPipelines(stock, options.num_gpus) as pipelines:
        yield {"ready_s": {"all": pipelines.ready_s}, "load_s": {"all": max(pipelines.load_s)}}
        pipelines.run(Cell(bench.least_steps, options.cells[0].guidance), 1)
        for cell, rounds in bench.cells():
            row: Row = {"cell": cell.name}
            if "latency" in options.whats:
                (alone,) = pipelines.run(cell, options.repeats, most=1)
                row["latency_s"] = statistics.median(video.computed - video.began for video in alone)
            if bench.saturates and rounds:
                written = [[video.written for video in videos] for videos in pipelines.run(cell, rounds + 1)]
                row |= throughput(written)
            yield row
        yield {"peak_bytes": {"all": max(pipelines.peak_bytes())}}


def measure_way(bench: Bench, way: Layout, *overrides: str) -> Iterator[Row]:
    """Start a pipeline laid out so, and measure it."""
    options = bench.options
    began, began_at = time.monotonic(), time.time()
    with Pipeline(load_way(bench, way, *overrides)) as pipeline:
        infos = pipeline.replicas
        ready = {name: max(i.ready for i in infos if i.stage == name) - began_at for name in {i.stage for i in infos}}
        loads = {name: max(i.load_s for i in infos if i.stage == name) for name in ready}
        yield {"ready_s": ready | {"all": time.monotonic() - began}, "load_s": loads}
        for guidance in dict.fromkeys(cell.guidance for cell in options.cells):
            warm_up(pipeline, way, Cell(bench.least_steps, guidance), options.format)
        alone = {
            cell: measure_alone(pipeline, cell, options) for cell, _ in bench.cells() if "latency" in options.whats
        }
        for cell, rounds in bench.cells():
            yield {"cell": cell.name} | alone.get(cell, {}) | (
                saturate(pipeline, way, bench, cell, rounds) if bench.saturates and rounds else {}
            )  # fmt: skip
        peaks = {name: health.gpu_peak_bytes for name, health in pipeline.health().items()}
        yield {
            "peak_bytes": by_stage(peaks),
            "weights_bytes": by_stage({i.name: sum(i.weights.values()) for i in infos}),
        }


def load_way(bench: Bench, way: Layout, *overrides: str) -> Config:
    """Return the configuration as `disagg-ray plan` prints it, with some changes."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(f"base: {Path(bench.options.config).absolute()}\n{to_yaml(to_settings(way, bench.stages))}")
        file.flush()
        return load_config(file.name, *bench.options.overrides, *overrides)


def make_request(cell: Cell, seed: int, file_format: str) -> Request:
    prompt = f"{PROMPT}, take {next(TAKES)}"
    return Request(prompt, num_inference_steps=cell.steps, guidance_scale=cell.guidance, seed=seed, format=file_format)


def warm_up(pipeline: Pipeline, way: Layout, cell: Cell, file_format: str) -> None:
    """Have every replica compute once: as many requests at once as could keep all of them busy."""
    count = max(way.replicas(stage) for seat in way.seats for stage in seat.stages)
    list(pipeline.generate_all(make_request(cell, seed, file_format) for seed in range(count)))


def measure_alone(pipeline: Pipeline, cell: Cell, options: Options) -> Row:
    results = [pipeline.generate(make_request(cell, seed, options.format)) for seed in range(options.repeats)]
    stages = [timing.stage for timing in results[0].stages]
    compute = {s: statistics.median(r.stages[place].compute_s for r in results) for place, s in enumerate(stages)}
    return {"latency_s": statistics.median(result.seconds for result in results), "compute_s": compute}


def saturate(pipeline: Pipeline, way: Layout, bench: Bench, cell: Cell, rounds: int) -> Row:
    """Keep all replicas busy until each transformer made its rounds and one more; what is left over is cancelled."""
    abreast = way.replicas(bench.stages.denoiser)
    count = abreast * (2 + rounds) + pipeline.config.max_in_flight
    finished: queue.SimpleQueue[tuple[float, Result] | DisaggError] = queue.SimpleQueue()
    with ThreadPoolExecutor(bench.options.num_gpus) as writers, tempfile.TemporaryDirectory() as folder:

        def save(handle: Handle, place: int) -> None:
            try:
                result = handle.result()
                path = Path(folder) / f"{place}.{bench.options.format}"
                result.save(path)
                path.unlink()
                finished.put((time.monotonic(), replace(result, data=None, frames=None)))
            except Cancelled:
                pass  # it was left over
            except DisaggError as error:
                finished.put(error)

        handles = []
        for place in range(count):
            handle = pipeline.submit(make_request(cell, place, bench.options.format))
            handle.add_done_callback(lambda done, place=place: writers.submit(save, done, place))
            handles.append(handle)
        made: list[tuple[float, Result]] = []
        written: dict[str, list[float]] = {}
        try:
            while len(made) < count and not (len(written) == abreast and min(map(len, written.values())) > rounds):
                made.append(answer(finished))
                moment, result = made[-1]
                written.setdefault(denoised_by(result, bench.stages.denoiser), []).append(moment)
        finally:
            for handle in handles:
                handle.cancel()
    results = [result for _, result in made]
    return throughput(list(written.values())) | {"busy": busy_share(results, bench.stages.denoiser)}


def denoised_by(result: Result, denoiser: str) -> str:
    """Return the replica that denoised a video; fused, that is the only one."""
    return next((timing.replica for timing in result.stages if timing.stage == denoiser), result.stages[0].replica)


def throughput(written: Sequence[Sequence[float]]) -> Row:
    return {"per_minute": per_minute(written), "written_s": since_first(written)}


def since_first(written: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return when each transformer's videos were written, from the first of all on."""
    first = min(min(mine) for mine in written)
    return [[round(moment - first, 3) for moment in mine] for mine in written]


def answer(finished: queue.SimpleQueue[tuple[float, Result] | DisaggError]) -> tuple[float, Result]:
    found = finished.get(timeout=VIDEO_S)
    if isinstance(found, DisaggError):
        raise found
    return found


def busy_share(results: Sequence[Result], stage: str) -> float | None:
    """Return the share of the time from a replica's first begin to its last that it computed, of all replicas."""
    turns: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for timing in result.stages:
            if timing.stage == stage:
                turns.setdefault(timing.replica, []).append((timing.started, timing.compute_s))
    shares = [
        sum(seconds for _, seconds in sorted(mine)[:-1]) / (max(mine)[0] - min(mine)[0])
        for mine in turns.values() if len(mine) > 1
    ]  # fmt: skip
    return statistics.mean(shares) if shares else None


def by_stage(values: Mapping[str, int]) -> dict[str, int]:
    """Return the most of each stage's replicas."""
    stages = {replica.rpartition("-")[0] for replica in values}
    return {stage: max(n for replica, n in values.items() if replica.rpartition("-")[0] == stage) for stage in stages}


def line(row: Row) -> str:
    """Return a row for reading."""
    parts = [f"{row['cell']}:"] if "cell" in row else []
    names = {
        "latency_s": "alone {:.2f} s",
        "per_minute": f"{{:.3f}} {row.get('makes', 'video')}s/min",
        "busy": "busy {:.1%}",
    }
    parts += [text.format(row[key]) for key, text in names.items() if row.get(key) is not None]
    for key, text, unit in (("compute_s", "compute s", 1), ("ready_s", "ready s", 1), ("load_s", "of it loading s", 1),
                            ("peak_bytes", "peak GB", 1e9)):  # fmt: skip
        if key in row:
            parts.append(f"{text} " + " ".join(f"{name} {value / unit:.2f}" for name, value in row[key].items()))
    cap = f" under {row['cap_gib']:g} GiB" if row.get("cap_gib") else ""
    return f"{row['way'] + cap:<64} {row.get('error') or ', '.join(parts)}"

"""Measurements, each beside its baseline in the same run; prints a table and writes JSON.

python jobs/bench.py overhead            # the tiny model split over actors against one process, on this machine
python jobs/bench.py transfer            # pools' pulls by route and size against bare Mooncake reads; also plots
python jobs/bench.py scheduler           # microseconds a dispatch, and waits on simulated replicas; also plots
python jobs/bench.py pipelined           # one request at a time against pipelined; one transformer against two
python jobs/bench.py tiles --config C --parts 2     # a decode whole, in tiles, and shared out among decoders
python jobs/bench.py soak                # requests while replicas are killed, and what processes hold; also plots
python jobs/bench.py latency,throughput,start --config C --gpus 2 --steps 4,20 --guidance 5,1    # stock, fused, splits
python jobs/bench.py memory --config C --gpus 2 --caps 48        # stock with offload against splits, under a cap
python jobs/bench.py memory --config conf/qwen_image.yaml model.path=C --caps 40    # images, as videos
python jobs/bench.py plan --profile P --tables T    # `disagg-ray plan` against the simulated scheduler and tables
python jobs/bench.py split --config conf/wan21_t2v_1_3b.yaml    # a model cut into stages against the same fused
python jobs/bench.py stage CKPT          # each stage's speed and error by option, beside stock diffusers
python jobs/bench.py denoiser forward --shape wan2.1-t2v-14b     # attention, compile and fusing beside stock; --help
python jobs/bench.py parallel --config C --parallel "cfg=2/ulysses=2"    # one video on several GPUs; --help
python jobs/bench.py decode_rows         # a decode whose rows are shared by 1, 2 and 4 GPUs; --help
python jobs/bench.py gang_forward        # one forward shared by GPUs: ulysses, sharded weights, compile; --help
python jobs/bench.py http                # what an HTTP service costs: jobs and polls a second, memory
python jobs/bench.py service bursts outputs/service.png    # first video after connect; also `deaths` and `answers`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks import denoiser, forward, parallel, plan, rows, scheduler, service, soak, stage, tables, tiles, transfer
from benchmarks.machine import machine
from benchmarks.stock import OFFLOADS, Cell
from benchmarks.ways import Options

from disagg_ray import LocalPipeline, Pipeline, Request, load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.result import Result, StageTiming

PLOTTED: dict[str, Any] = {
    "transfer": transfer, "scheduler": scheduler, "soak": soak, "plan": plan,
}  # fmt: skip
OWN = ("overhead", "pipelined", "split", "tiles")


def overhead(repeats: int) -> dict[str, Any]:
    """Time one request at a time through three actors and through one process, in turn."""
    config = "conf/tiny_t2v.yaml"
    request = Request(prompt="a red circle moving left", seed=7)
    local = LocalPipeline.from_config(config)
    with Pipeline.from_config(config) as split:
        for pipeline in (local, split):
            pipeline.generate(request)
        pairs = [(local.generate(request), split.generate(request)) for _ in range(repeats)]
    stages = [result.stages for _, result in pairs]
    share = {
        name: statistics.median(sum(getattr(stage, name) for stage in timings) for timings in stages)
        for name in ("queue_s", "pull_s", "compute_s", "publish_s")
    }
    return {
        "repeats": repeats,
        "local_s": statistics.median(result.seconds for result, _ in pairs),
        "split_s": statistics.median(result.seconds for _, result in pairs),
        "added_s": statistics.median(b.seconds - a.seconds for a, b in pairs),
        "local_compute_s": statistics.median(sum(s.compute_s for s in result.stages) for result, _ in pairs),
        **{f"split_{name}": seconds for name, seconds in share.items()},
    }


def split(config: str, overrides: Sequence[str], repeats: int = 3) -> dict[str, Any]:
    """Time one request at a time and then all queued at once, cut into stages and fused, one pipeline after another."""
    shapes = {"split": (), "fused": ("fused=true",)}
    rows = {name: _run(Pipeline.from_config(config, *overrides, *extra), repeats) for name, extra in shapes.items()}
    return rows | {"split_over_fused": rows["split"]["seconds"] / rows["fused"]["seconds"]}


def _run(pipeline: Pipeline, repeats: int) -> dict[str, Any]:
    requests = [Request(prompt="a red circle moving left", seed=seed, format="npy") for seed in range(repeats + 1)]
    with pipeline:
        pipeline.generate(requests[0])  # a warm-up
        alone = [pipeline.generate(request) for request in requests[1:]]
        began = time.perf_counter()
        queued = list(pipeline.generate_all(requests[1:]))
        queued_s = time.perf_counter() - began
        held = {name: sum(weights.values()) for name, weights in pipeline.weights.items()}
        pools = pipeline.pools
    by_stage = {stage.stage: [r.stages[place] for r in alone] for place, stage in enumerate(alone[0].stages)}
    names = ("queue_s", "pull_s", "compute_s", "publish_s")
    return {
        "seconds": statistics.median(result.seconds for result in alone),
        "seconds_each_when_queued": queued_s / repeats,
        "stages": {
            stage: {name: statistics.median(getattr(t, name) for t in timings) for name in names}
            | {"route": timings[-1].route, "pulled_bytes": timings[-1].pulled_bytes}
            for stage, timings in by_stage.items()
        },
        "memory": {
            t.replica: {"weights": held[t.replica], "pool": pools[t.replica], "peak": t.peak_bytes}
            for t in queued[-1].stages
        },
        "idle_gaps_s": {stage: _gaps([t for r in queued for t in r.stages if t.stage == stage]) for stage in by_stage},
    }


def pipelined(repeats: int) -> dict[str, Any]:
    """Time requests one after the other and then all queued, with one transformer and with two."""
    load = psutil.getloadavg()[0]
    rows = {f"{number} transformer": _throughput(number, repeats) for number in (1, 2)}
    one, two = rows.values()
    return {
        "repeats": repeats,
        "load_before": load,
        **rows,
        "pipelined_over_alone": one["queued_per_min"] / one["alone_per_min"],
        "two_over_one": two["queued_per_min"] / one["queued_per_min"],
    }


def _throughput(num_transformers: int, repeats: int) -> dict[str, Any]:
    requests = [Request(prompt="a red circle moving left", seed=seed) for seed in range(repeats)]
    with Pipeline.from_config("conf/tiny_t2v.yaml", f"stages.transformer.replicas={num_transformers}") as pipeline:
        for _ in pipeline.generate_all(requests[:2]):
            pass  # a warm-up
        began = time.perf_counter()
        alone = [pipeline.generate(request) for request in requests]
        between = time.perf_counter()
        queued = list(pipeline.generate_all(requests))
        ended = time.perf_counter()
    return {
        "alone_per_min": 60 * repeats / (between - began),
        "queued_per_min": 60 * repeats / (ended - between),
        "compute_s_alone": _compute_s(alone),
        "compute_s_queued": _compute_s(queued),
    }


def _compute_s(results: Sequence[Result]) -> dict[str, float]:
    by_stage: dict[str, list[float]] = {}
    for timing in (timing for result in results for timing in result.stages):
        by_stage.setdefault(timing.stage, []).append(timing.compute_s + timing.publish_s)
    return {stage: statistics.median(seconds) for stage, seconds in by_stage.items()}


def _gaps(timings: Sequence[StageTiming]) -> list[float]:
    """Return how long a replica computed nothing between one request and the next."""
    turns = sorted(timings, key=lambda timing: timing.started)
    return [after.started - before.started - before.compute_s for before, after in pairwise(turns)]


def table_options(options: argparse.Namespace, whats: tuple[str, ...]) -> Options:
    least = load_config(options.config, *options.overrides).model.traits.least_steps
    few = f"{least},{least + 1}"
    steps = [int(number) for number in (options.steps or (few if options.quick else "4,20")).split(",")]
    rounds = [int(number) for number in (options.rounds or ",".join("4" if n < 10 else "2" for n in steps)).split(",")]
    guidance = [float(scale) for scale in options.guidance.split(",")]
    return Options(
        options.config, tuple(options.overrides), whats, options.gpus,
        tuple(Cell(n, scale) for n in steps for scale in guidance), tuple(n for n in rounds for _ in guidance),
        options.repeats or 2, options.format, tuple(filter(None, options.only.split("/"))),
        tuple(float(cap) for cap in options.caps.split(",") if cap), tuple(options.offload.split(",")),
        tuple(to_gang(text) for text in options.gangs.split("/") if text),
        options.output / f"bench_{'_'.join(whats)}.jsonl", time.monotonic() + options.seconds,
    )  # fmt: skip


def to_gang(text: str) -> ParallelConfig:
    return ParallelConfig(**{name: int(number) for name, _, number in (p.partition("=") for p in text.split(","))})


def measure(options: argparse.Namespace, whats: tuple[str, ...]) -> Any:
    config, overrides, repeats = options.config, options.overrides, options.repeats
    works: dict[str, Callable[[], Any]] = {
        "overhead": lambda: overhead(repeats or 20),
        "pipelined": lambda: pipelined(repeats or 20),
        "split": lambda: split(config, overrides, repeats or 3),
        "tiles": lambda: tiles.measure(config, overrides, options.parts, repeats or 3),
        "soak": lambda: soak.run(options.requests, options.kill_every, options.seed),
        "plan": lambda: plan.measure(options.profile, options.tables),
        "transfer": transfer.measure,
        "scheduler": scheduler.measure,
    }
    if whats[0] in tables.WHATS:
        return tables.measure(table_options(options, whats))
    return works[options.what]()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        help=f"{', '.join((*OWN, *PLOTTED))}, or of latency,throughput,memory,start some",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides, for split, tiles and tables"
    )
    parser.add_argument("--config", default="conf/tiny_t2v.yaml", help="for split, tiles and tables")
    parser.add_argument("--repeats", type=int, help="by default 20 for overhead and pipelined, 3 for split and tiles")
    parser.add_argument("--parts", type=int, default=2, help="for tiles: decoders")
    parser.add_argument("--requests", type=int, default=1000, help="for soak")
    parser.add_argument("--kill-every", type=float, default=8.0, metavar="SECONDS", help="for soak")
    parser.add_argument("--seed", type=int, default=0, help="for soak")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder")
    parser.add_argument("--quick", action="store_true", help="tables: few steps, few videos")
    parser.add_argument("--gpus", type=int, default=2, help="tables: of each way; without GPUs, threads")
    parser.add_argument("--steps", help="tables: comma separated")
    parser.add_argument("--guidance", default="5,1", help="tables: comma separated; 1 is none")
    parser.add_argument("--rounds", help="tables: videos of each transformer that are timed, for each of --steps")
    parser.add_argument(
        "--format", default="npy", choices=("npy", "mp4", "png"), help="tables: of the files that are written"
    )
    parser.add_argument("--only", default="", help="tables: words of the ways' names, separated by /")
    parser.add_argument("--caps", default="", help="tables: GiB of a GPU, comma separated")
    parser.add_argument(
        "--offload", default="model,group", help=f"tables: of stock under a cap; some of {','.join(OFFLOADS)}"
    )
    parser.add_argument("--gangs", default="", help="tables: transformers of several ranks, as cfg=2/cfg=2,ulysses=2")
    parser.add_argument("--seconds", type=float, default=500.0, help="tables: after which nothing more is begun")
    parser.add_argument("--profile", type=Path, help="plan: of the hardware that --tables were measured on")
    parser.add_argument("--tables", type=Path, help="plan: the JSON of a throughput run")
    return parser


def measure_http(arguments: Sequence[str]) -> None:
    from benchmarks import http  # needs Ray Serve, which the others do without

    http.main(arguments)


def main() -> None:
    commands = {
        "stage": stage.main, "service": service.main, "http": measure_http, "denoiser": denoiser.main,
        "parallel": parallel.main, "decode_rows": rows.main, "gang_forward": forward.main,
    }  # fmt: skip
    if sys.argv[1:2] and sys.argv[1] in commands:
        commands[sys.argv[1]](sys.argv[2:])
        return
    parser = make_parser()
    options = parser.parse_intermixed_args()
    whats = tuple(options.what.split(","))
    if not set(options.offload.split(",")) <= set(OFFLOADS):
        parser.error(f"--offload {options.offload!r}: write some of {','.join(OFFLOADS)}")
    if not set(whats) <= set(tables.WHATS) and options.what not in (*OWN, *PLOTTED):
        parser.error(f"{options.what!r}: see --help")
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    result = measure(options, whats)
    name = "_".join(whats)
    text = json.dumps({"machine": machine(), name: result, "command": sys.argv[1:]}, indent=2)
    (options.output / f"bench_{name}.json").write_text(text + "\n")
    if options.what in PLOTTED:
        PLOTTED[options.what].report(result, options.output)
    elif whats[0] in tables.WHATS:
        tables.report(result, options.output / f"bench_{name}.png")
    else:
        print(text)


if __name__ == "__main__":
    main()

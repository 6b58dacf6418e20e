"""One video on several GPUs beside stock diffusers on one and on as many, in one run; prints JSON lines.

python jobs/bench.py parallel --config conf/wan21_t2v_14b.yaml model.path=CKPT --sizes 480x832x81:3/720x1280x81:2 \\
    stages.transformer.num_gpus=0.8 stages.encoder.num_gpus=0.1 stages.decoder.num_gpus=0.1 share_gpu=[]
python jobs/bench.py parallel --quick     # a CPU, the tiny model: that it runs

A checkpoint of random weights is made by `disagg-ray make-checkpoint`. Stock on several GPUs is what a user would start
with torchrun: a process a GPU that calls `enable_parallelism`; diffusers needs GPUs for it. Each way is loaded once
and, for each size, first makes one video of one step that is not timed. Ways run at the same time while there are GPUs
for them. A way gets as many GPUs as it has ranks, so encoder and decoder need a part of one. Stock's `denoise_s` begins
with its first forward; ours is what the transformer stage computes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import machine, note, now
from benchmarks.pipelines import load_stock_pipeline

from disagg_ray import Pipeline, Request, environment
from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.models.checkpoint import open_checkpoint

Row = dict[str, Any]
PROMPT, SEED = "a red circle moving left", 7
WAY_S = 600.0
WAYS = "stock/ours/stock ulysses=2/ours ulysses=2/ours cfg=2/ours cfg=2,ulysses=2"
QUICK = "stock/ours/ours ulysses=2/ours cfg=2"
VISIBLE = "CUDA_VISIBLE_DEVICES"
COMPARED = 16
"""Compare every Nth frame between ways; the digest covers all frames."""


@dataclass(frozen=True)
class Size:
    height: int
    width: int
    num_frames: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> Size:
        size, _, steps = text.partition(":")
        return cls(*(int(number) for number in size.split("x")), int(steps or 4))


@dataclass(frozen=True)
class Way:
    """Stock or ours, and how its ranks share a video; named as on the command line."""

    name: str

    @property
    def is_stock(self) -> bool:
        return self.name.startswith("stock")

    @property
    def parallel(self) -> dict[str, str]:
        _, _, given = self.name.partition(" ")
        return dict(pair.split("=") for pair in given.split(",")) if given else {}

    @property
    def num_gpus(self) -> int:
        return int(np.prod([int(self.parallel.get(name, 1)) for name in ("cfg", "ulysses", "ring")]))

    @property
    def override(self) -> str:
        given = ", ".join(f"{name}: {value}" for name, value in self.parallel.items())
        return f"stages.transformer.parallel={{{given}}}"


@dataclass(frozen=True)
class Task:
    config: str
    overrides: tuple[str, ...]
    sizes: tuple[Size, ...]
    repeats: int


def measure(way: Way, task: Task, gpus: list[int]) -> Iterator[Row]:
    """Yield a row for each size from processes that see these GPUs only."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours, theirs = context.Pipe(duplex=False)
    children = []
    for rank in range(way.num_gpus if way.is_stock else 1):
        child = context.Process(target=_serve, args=(theirs, way, task, rank, port))
        with SPAWNING:
            environment.replace(VISIBLE, ",".join(map(str, gpus)))
            child.start()
        children.append(child)
    try:
        for _ in task.sizes:
            if not ours.poll(WAY_S):
                raise TimeoutError(f"no answer for {WAY_S:g} s")
            yield ours.recv()
    finally:
        ends = threading.Timer(30.0, lambda: [child.kill() for child in children])
        ends.start()
        for child in children:
            if way.is_stock:
                child.kill()
            child.join()
        ends.cancel()


SPAWNING = threading.Lock()


def _serve(connection: Connection, way: Way, task: Task, rank: int, port: int) -> None:
    try:
        for row in _stock(way, task, rank, port) if way.is_stock else _ours(way, task):
            if rank == 0:
                frames = np.asarray(row.pop("frames"))
                row["sha256"] = hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()[:16]
                connection.send(row | {"frames": frames[::COMPARED]})
    except Exception as error:  # noqa: BLE001 - a way that fails is a row
        failed = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        for _ in task.sizes:
            connection.send(failed)
    if way.is_stock:
        time.sleep(WAY_S)  # ended by the parent, once rank 0 has answered


def _stock(way: Way, task: Task, rank: int, port: int) -> Iterator[Row]:
    config = load_config(task.config, *task.overrides)
    pipeline = _load_stock(config, way, rank, port)
    on_gpu = torch.cuda.is_available()
    began, ended = [0.0], [0.0]

    def note_begin(*_: Any) -> None:
        began[0] = began[0] or now(on_gpu)

    for name in ("transformer", "transformer_2"):
        if (model := getattr(pipeline, name, None)) is not None:
            model.register_forward_pre_hook(note_begin)
    decode = pipeline.vae.decode

    def note_end(*args: Any, **kwargs: Any) -> Any:
        ended[0] = now(on_gpu)
        return decode(*args, **kwargs)

    pipeline.vae.decode = note_end
    for size in task.sizes:
        _generate(pipeline, config, size, 1)
        seconds, denoise, frames = [], [], None
        for _ in range(task.repeats):
            began[0], start = 0.0, now(on_gpu)
            frames = _generate(pipeline, config, size, size.steps)
            seconds.append(now(on_gpu) - start)
            denoise.append(ended[0] - began[0])
        held = torch.cuda.max_memory_reserved() / 1e9 if on_gpu else 0.0
        yield _timed(seconds, denoise) | {"held_gb": held, "frames": frames}


def _load_stock(config: Config, way: Way, rank: int, port: int) -> Any:
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{rank}" if on_gpu else "cpu"
    torch.set_num_threads(1)
    stages = {"text_encoder": "encoder", "image_encoder": "encoder", "vae": "decoder"}
    components = ("text_encoder", "image_encoder", "vae", "transformer", "transformer_2")
    dtypes = {name: config.dtype_of(stages.get(name, "transformer"), name) for name in components}
    if on_gpu:
        torch.cuda.set_device(rank)
    pipeline = load_stock_pipeline(open_checkpoint(config.model).folder, dtypes, device)
    if way.num_gpus > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=way.num_gpus)
        from diffusers import ContextParallelConfig

        for name in ("transformer", "transformer_2"):
            if (model := getattr(pipeline, name, None)) is not None:
                model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=way.num_gpus))
    return pipeline


def _timed(seconds: list[float], denoise: list[float]) -> Row:
    return {"seconds": statistics.median(seconds), "denoise_s": statistics.median(denoise)}


def _generate(pipeline: Any, config: Config, size: Size, steps: int) -> Any:
    defaults = config.defaults
    scales = {} if defaults.guidance_scale_2 is None else {"guidance_scale_2": defaults.guidance_scale_2}
    return pipeline(
        PROMPT, defaults.negative_prompt, height=size.height, width=size.width, num_frames=size.num_frames,
        num_inference_steps=steps, guidance_scale=defaults.guidance_scale, **scales,
        max_sequence_length=config.model.max_sequence_length, generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).frames[0]  # fmt: skip


def _ours(way: Way, task: Task) -> Iterator[Row]:
    with Pipeline.from_config(task.config, *task.overrides, *([way.override] if way.parallel else [])) as pipeline:
        for size in task.sizes:
            shape = {"height": size.height, "width": size.width, "num_frames": size.num_frames}
            asked = [1, *[size.steps] * task.repeats]
            requests = [Request(PROMPT, seed=SEED, format="npy", num_inference_steps=n, **shape) for n in asked]
            results = [pipeline.submit(request).result(WAY_S) for request in requests][1:]
            denoise = [next(t.compute_s for t in result.stages if t.stage == "transformer") for result in results]
            peaks = {timing.replica: timing.peak_bytes / 1e9 for timing in results[-1].stages}
            timed = _timed([result.seconds for result in results], denoise)
            yield timed | {"held_gb": peaks, "frames": results[-1].frames}


class Report:
    """Rows, each beside the first way's of its size."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._first: dict[Size, Row] = {}
        self._later: list[tuple[Way, Size, Row]] = []

    def add(self, way: Way, size: Size, row: Row, is_first: bool) -> None:
        with self._lock:
            if is_first:
                self._first[size] = row
            self._later.append((way, size, row))
            note(self._path, {"way": way.name, "gpus": way.num_gpus, "size": str(size)} | without_frames(row))

    def compare(self) -> None:
        """Print each way's share of the first one's seconds, and the difference of frames."""
        for way, size, row in self._later:
            first = self._first.get(size, {})
            if "frames" in row and "frames" in first:
                apart = float(np.abs(row["frames"] - first["frames"]).max())
                share = row["denoise_s"] / first["denoise_s"]
                equal = row["sha256"] == first["sha256"]
                found = {"of_first": share, "equal": equal, "max_difference": apart}
                note(self._path, {"way": way.name, "size": str(size)} | found)


def without_frames(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "frames"}


class Gpus:
    """GPUs of this machine, lent in the order of asking; without GPUs one way runs after the other."""

    def __init__(self) -> None:
        self._free = list(range(torch.cuda.device_count()))
        self.on_cpu = not self._free
        self._change = threading.Condition()

    def take(self, count: int) -> list[int]:
        with self._change:
            self._change.wait_for(lambda: len(self._free) >= count)
            return [self._free.pop(0) for _ in range(count)]

    def give(self, gpus: list[int]) -> None:
        with self._change:
            self._free = sorted([*self._free, *gpus])
            self._change.notify_all()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides")
    parser.add_argument("--config", default="conf/tiny_t2v.yaml")
    parser.add_argument("--ways", default=WAYS, help=f"separated by /; default {WAYS}")
    parser.add_argument("--sizes", default="480x832x81:4", help="HEIGHTxWIDTHxFRAMES:STEPS, separated by /")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--quick", action="store_true", help="a small size of the tiny model, one thread a rank")
    options = parser.parse_intermixed_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    quick = ("stages.transformer.num_threads=1",) if options.quick else ()
    sizes = "64x64x9:2" if options.quick else options.sizes
    sizes = tuple(Size.parse(text) for text in sizes.split("/"))
    task = Task(options.config, (*options.overrides, *quick), sizes, options.repeats)
    path = options.output / "bench_parallel.jsonl"
    path.write_text(json.dumps({"machine": machine(), "command": arguments}) + "\n")
    report, gpus = Report(path), Gpus()
    ways = [Way(name) for name in (QUICK if options.quick else options.ways).split("/")]

    def run(way: Way, lent: list[int]) -> None:
        try:
            for size, row in zip(task.sizes, measure(way, task, lent), strict=True):
                report.add(way, size, row, way is ways[0])
        except Exception as error:  # noqa: BLE001 - a way that fails is a row
            report.add(way, task.sizes[0], {"error": f"{type(error).__name__}: {error}"}, False)
        finally:
            gpus.give(lent)

    with ThreadPoolExecutor(1 if gpus.on_cpu else len(ways)) as pool:
        for way in ways:
            lent = [] if gpus.on_cpu else gpus.take(way.num_gpus)
            pool.submit(run, way, lent)
    report.compare()

"""One video on several GPUs beside stock diffusers on one and on as many, in one run; prints JSON lines.

python jobs/bench.py parallel --config conf/wan21_t2v_14b.yaml model.path=CKPT --parallel "cfg=2/ulysses=2" --steps 4
python jobs/bench.py parallel --quick     # a CPU, the tiny model: that it runs

A checkpoint of random weights is made by `disagg-ray make-checkpoint`. Stock on several GPUs is what a user would start
with torchrun: a process a GPU that calls `enable_parallelism`; diffusers needs GPUs for it. Each way first makes one
video that is not timed. Stock's `denoise_s` begins with its first forward; ours is what the transformer stage computes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import machine
from benchmarks.pipelines import load_stock_pipeline

from disagg_ray import Pipeline, Request
from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.models.checkpoint import open_checkpoint

Row = dict[str, Any]
PROMPT, SEED = "a red circle moving left", 7
START_S = 600.0


def stock(config: Config, repeats: int, num_ranks: int) -> Row:
    """Time stock diffusers on one GPU, or on several by its own Ulysses; `frames` are those of rank 0."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours, theirs = context.Pipe(duplex=False)
    children = []
    for rank in range(num_ranks):
        args = (theirs, config, repeats, rank, num_ranks, port)
        children.append(context.Process(target=_serve, args=args, daemon=True))
        children[-1].start()
    try:
        if not ours.poll(START_S):
            raise TimeoutError(f"stock gave no answer for {START_S:g} s")
        answer: Row = ours.recv()
    finally:
        for child in children:
            child.kill()
            child.join()
    return answer


def _serve(connection: Connection, config: Config, repeats: int, rank: int, num_ranks: int, port: int) -> None:
    try:
        row = _time_stock(config, repeats, rank, num_ranks, port)
    except Exception as error:  # noqa: BLE001 - a way that fails is a row
        row = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    if rank == 0 or "error" in row:
        connection.send(row)
    time.sleep(START_S)  # ended by the parent, once rank 0 has answered


def _time_stock(config: Config, repeats: int, rank: int, num_ranks: int, port: int) -> Row:
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{rank}" if on_gpu else "cpu"
    torch.set_num_threads(1)
    stages = {"text_encoder": "encoder", "image_encoder": "encoder", "vae": "decoder"}
    components = ("text_encoder", "image_encoder", "vae", "transformer", "transformer_2")
    dtypes = {name: config.dtype_of(stages.get(name, "transformer"), name) for name in components}
    if on_gpu:
        torch.cuda.set_device(rank)
    pipeline = load_stock_pipeline(open_checkpoint(config.model).folder, dtypes, device)
    if num_ranks > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=num_ranks)
        from diffusers import ContextParallelConfig

        pipeline.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=num_ranks))
    seconds, denoise, began, frames = [], [], [0.0], None

    def note(*_: Any) -> None:
        began[0] = began[0] or _now(on_gpu)

    for name in ("transformer", "transformer_2"):
        if (model := getattr(pipeline, name, None)) is not None:
            model.register_forward_pre_hook(note)
    decode = pipeline.vae.decode
    ended = [0.0]

    def note_end(*args: Any, **kwargs: Any) -> Any:
        ended[0] = _now(on_gpu)
        return decode(*args, **kwargs)

    pipeline.vae.decode = note_end
    for _ in range(repeats + 1):
        began[0], start = 0.0, _now(on_gpu)
        frames = _generate(pipeline, config)
        seconds.append(_now(on_gpu) - start)
        denoise.append(ended[0] - began[0])
    held = torch.cuda.max_memory_reserved() / 1e9 if on_gpu else 0.0
    timed = {"seconds": statistics.median(seconds[1:]), "denoise_s": statistics.median(denoise[1:])}
    return {**timed, "held_gb": held, "frames": frames}


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _generate(pipeline: Any, config: Config) -> Any:
    defaults = config.defaults
    scales = {} if defaults.guidance_scale_2 is None else {"guidance_scale_2": defaults.guidance_scale_2}
    return pipeline(
        PROMPT, defaults.negative_prompt, height=defaults.height, width=defaults.width, num_frames=defaults.num_frames,
        num_inference_steps=defaults.num_inference_steps, guidance_scale=defaults.guidance_scale, **scales,
        max_sequence_length=config.model.max_sequence_length, generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).frames[0]  # fmt: skip


def ours(options: argparse.Namespace, overrides: list[str], repeats: int) -> Row:
    """Time one request alone through Ray."""
    with Pipeline.from_config(options.config, *overrides) as pipeline:
        results = [
            pipeline.submit(Request(PROMPT, seed=SEED, format="npy")).result(START_S) for _ in range(repeats + 1)
        ]
        peaks = {timing.replica: timing.peak_bytes / 1e9 for timing in results[-1].stages}
    denoise = [next(t.compute_s for t in result.stages if t.stage == "transformer") for result in results[1:]]
    timed = {"seconds": statistics.median(r.seconds for r in results[1:]), "denoise_s": statistics.median(denoise)}
    return {**timed, "held_gb": peaks, "frames": results[-1].frames}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides")
    parser.add_argument("--config", default="conf/tiny_t2v.yaml")
    parser.add_argument("--parallel", default="cfg=2/ulysses=2", help="ours, as cfg=2,ulysses=2, separated by /")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--quick", action="store_true", help="small sizes of the tiny model, one thread a rank")
    options = parser.parse_intermixed_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    overrides = [*options.overrides, f"defaults.num_inference_steps={options.steps}"]
    if options.quick:
        overrides += ["stages.transformer.num_threads=1", "defaults.height=64", "defaults.width=64"]
    config = load_config(options.config, *overrides)
    ways = [dict(pair.split("=") for pair in way.split(",")) for way in options.parallel.split("/")]
    most = max(int(np.prod([int(number) for number in way.values()])) for way in ways)
    path = options.output / "bench_parallel.jsonl"
    path.write_text(json.dumps({"machine": machine(), "command": arguments}) + "\n")
    first: Row = {}

    def add(name: str, row: Row) -> None:
        frames = row.pop("frames", None)
        if not first and frames is not None:
            first.update(row, frames=frames)
        if first and frames is not None:
            row["of_one_gpu"] = row["denoise_s"] / first["denoise_s"]
            row["max_difference"] = float(np.abs(frames - first["frames"]).max())
        print(text := json.dumps({"way": name} | row), flush=True)
        with path.open("a") as file:
            file.write(text + "\n")

    add("stock, one", stock(config, options.repeats, 1))
    add("ours, one", ours(options, overrides, options.repeats))
    if torch.cuda.device_count() >= most:
        add(f"stock, ulysses={most}", stock(config, options.repeats, most))
    for way in ways:
        given = ", ".join(f"{name}: {number}" for name, number in way.items())
        add(f"ours, {given}", ours(options, [*overrides, f"stages.transformer.parallel={{{given}}}"], options.repeats))

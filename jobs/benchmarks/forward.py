"""One forward of a transformer that several GPUs share, by option, beside one GPU; prints JSON lines.

python jobs/bench.py gang_forward --ranks 2                       # Wan 14B, random weights, 480x832x81
python jobs/bench.py gang_forward --ways "/ulysses/ulysses shard" --shape wan2.1-t2v-1.3b
python jobs/bench.py gang_forward --quick                         # CPUs and gloo, a tiny model: that it runs

A way is whether all ranks share the tokens (`ulysses`) and the weights (`shard`), and the options `flash_4`, `compile`
and `fuse`; `fast` is all three. The first way, without words, is one GPU. `seconds` are the median at rank 0, the first
forward not counted; `apart` is the largest difference to one GPU's, over its deviation. Last, what rank 0 pulled is
given to all, as before a video: seconds by bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks.denoiser_model import Model, tune
from benchmarks.machine import machine, note, now
from benchmarks.ranks import ANSWER_S, Row, run_ranks

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.models.parallel.ranks import Ranks, layout_of
from disagg_ray.models.parallel.spread import spread
from disagg_ray.models.wan.shapes import get_shape

WAYS = "/ulysses/ulysses shard/ulysses flash_4/ulysses fast/ulysses fast shard"
QUICK = "/ulysses/ulysses shard"
SHARED = (2**20, 16 * 2**20, 256 * 2**20)
"""Bytes."""


@dataclass(frozen=True)
class Work:
    """What each way computes."""

    shape: str
    size: tuple[int, ...]
    """Height, width and number of frames."""
    ways: tuple[str, ...]
    repeats: int
    log: Path


def forward(work: Work, rank: int, num_ranks: int, address: str) -> list[Row]:
    """Return a row for each way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = Ranks.join(rank, address, ParallelConfig(ulysses=num_ranks), device, ANSWER_S)
    rows: list[Row] = []
    expected = None
    for way in work.ways:
        gc.collect()
        row, made = _measure(work, way.split(), ranks)
        expected = made if expected is None else expected
        row |= {"way": way or "one GPU", "apart": float((made - expected).abs().max() / expected.std())}
        rows.append(row)
        if rank == 0:
            note(work.log, row)
    rows += [{"bytes": size, "seconds": _share(ranks, size)} for size in SHARED]
    return rows


def _share(ranks: Ranks, size: int) -> float:
    """Time the broadcast of a tensor of `size` bytes from rank 0; return the median seconds of ten."""
    tensors = {"latents": torch.zeros(size, dtype=torch.uint8, device=ranks.device)}
    seconds = []
    for _ in range(11):
        ranks.agree(True)
        began = now(ranks.device == "cuda")
        ranks.share(layout_of(tensors), tensors if ranks.rank == 0 else None)
        ranks.agree(True)
        seconds.append(now(ranks.device == "cuda") - began)
    return statistics.median(seconds[1:])


def _measure(work: Work, words: list[str], ranks: Ranks) -> tuple[Row, torch.Tensor]:
    on_gpu = ranks.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    model = Model(get_shape(work.shape), work.size, ranks.device)
    fast = "fast" in words
    tune(
        attention="flash_4" if fast or "flash_4" in words else None,
        compile="default" if fast or "compile" in words else None,
        fuse=fast or "fuse" in words,
    )(model)
    if "ulysses" in words:
        ranks.parallel = ParallelConfig(ulysses=ranks.size, shard_weights="shard" in words)
        spread("stages.transformer", model.transformer, ranks)
    began = now(on_gpu)
    made = model.forward()
    ready, seconds = now(on_gpu) - began, []
    held = torch.cuda.memory_allocated() / 1e9 if on_gpu else 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(work.repeats):
        ranks.agree(True)  # so that they begin together
        began = now(on_gpu)
        made = model.forward()
        seconds.append(now(on_gpu) - began)
    row: Row = {"seconds": statistics.median(seconds), "first_s": ready, "held_gb": held}
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return row, made.float().cpu()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="wan2.1-t2v-14b", help="of the transformer")
    parser.add_argument("--size", default="480x832x81", help="height x width x frames")
    parser.add_argument("--ways", default=WAYS, help=f"separated by /; default {WAYS}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--quick", action="store_true", help="a small size of the tiny model")
    options = parser.parse_args(arguments)
    shape, size, ways = ("tiny-t2v", "32x48x5", QUICK) if options.quick else (options.shape, options.size, options.ways)
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "bench_gang_forward.jsonl"
    log.write_text(json.dumps({"machine": machine(), "command": arguments}) + "\n")
    work = Work(shape, tuple(int(number) for number in size.split("x")), tuple(ways.split("/")), options.repeats, log)
    rows = run_ranks(partial(forward, work), options.ranks)
    one = next((row["seconds"] for row in rows if row.get("way") == "one GPU"), None)
    for row in rows:
        if "error" in row:
            print(json.dumps(row))
        elif "bytes" in row:
            note(log, row)
        elif one is not None:
            print(f"{row['way']}: {row['seconds']:.3f} s, {one / row['seconds']:.3f} times as fast as one GPU")

"""A decode whose rows are shared by 1, 2 and 4 GPUs, in one run; prints JSON lines.

python jobs/bench.py decode_rows                      # Wan 2.1's VAE, random weights, 480x832x81 and 720x1280x81
python jobs/bench.py decode_rows --shape wan2.2-ti2v-5b --sizes 704x1280x121
python jobs/bench.py decode_rows --quick              # CPUs and gloo, the tiny VAE: that it runs

`seconds` are of `vae.decode` at rank 0, with the whole video put together there; the first decode is not timed.
`max_difference` is to the frames of one GPU, between -1 and 1, of which `scale` is the standard deviation and `clamped`
the share that is -1 or 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.machine import machine, note, now
from benchmarks.ranks import ANSWER_S, Row, run_ranks

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.models.wan.random import build_component
from disagg_ray.models.wan.shapes import get_shape


@dataclass(frozen=True)
class Work:
    """What each way decodes."""

    shape: str
    sizes: tuple[tuple[int, int, int], ...]
    """Heights, widths and numbers of frames."""
    dtypes: tuple[str, ...]
    repeats: int
    folder: Path
    """Where one GPU leaves its frames."""
    log: Path


def decode(work: Work, rank: int, num_ranks: int, address: str) -> list[Row]:
    """Return rank 0's rows, one a dtype and size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = None
    if num_ranks > 1:
        from disagg_ray.models.parallel.ranks import Ranks

        ranks = Ranks.join(rank, address, ParallelConfig(rows=num_ranks), device, ANSWER_S)
    rows = []
    for dtype in work.dtypes:
        vae = build_component(get_shape(work.shape), "vae", dtype, device).eval()
        if ranks is not None:
            from disagg_ray.models.parallel.rows import split_rows

            split_rows(vae, ranks)
        for size in work.sizes:
            rows.append({"ranks": num_ranks, "dtype": dtype} | _decode(work, vae, size, rank))
            if rank == 0:
                note(work.log, rows[-1])
        del vae
    return rows


@torch.inference_mode()
def _decode(work: Work, vae: Any, size: tuple[int, int, int], rank: int) -> Row:
    height, width, num_frames = size
    factor = vae.config.scale_factor_spatial
    shape = (1, vae.config.z_dim, (num_frames - 1) // 4 + 1, height // factor, width // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(vae.device, vae.dtype)
    on_gpu = latents.is_cuda
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(work.repeats + 1):
        frames = None
        began = now(on_gpu)
        frames = vae.decode(latents, return_dict=False)[0]
        seconds.append(now(on_gpu) - began)
    row = {
        "size": "x".join(map(str, size)),
        "seconds": statistics.median(seconds[1:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    }
    return row | _compare(work, f"{row['size']}-{vae.dtype}", frames if rank == 0 else None)


def _compare(work: Work, name: str, frames: torch.Tensor | None) -> Row:
    """Keep one GPU's frames, or compare with them."""
    if frames is None:
        return {}
    path = work.folder / f"{name}.pt"
    if not path.exists():
        torch.save(frames.cpu(), path)
    first, made = torch.load(path, map_location=frames.device).float(), frames.float()
    difference = (made - first).abs()
    return {
        "max_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "scale": first.std().item(),
        "clamped": (first.abs() == 1).float().mean().item(),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="wan2.1-t2v-14b", help="whose VAE")
    parser.add_argument("--sizes", default="480x832x81,720x1280x81", help="height x width x frames, comma separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma separated")
    parser.add_argument("--ranks", default="1,2,4", help="comma separated; more than there are GPUs are left out")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--quick", action="store_true", help="small sizes of the tiny VAE")
    options = parser.parse_args(arguments)
    shape, sizes = ("tiny-t2v", "64x96x9,48x64x5") if options.quick else (options.shape, options.sizes)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "bench_decode_rows.jsonl"
    path.write_text(json.dumps({"machine": machine(), "command": arguments}) + "\n")
    asked = [int(number) for number in options.ranks.split(",")]
    able = [n for n in asked if options.quick or n <= torch.cuda.device_count()]
    first: dict[tuple[str, str], float] = {}
    with TemporaryDirectory() as folder:
        cells = tuple((int(h), int(w), int(n)) for h, w, n in (size.split("x") for size in sizes.split(",")))
        work = Work(shape, cells, tuple(options.dtypes.split(",")), options.repeats, Path(folder), path)
        for row in (row for num_ranks in able for row in run_ranks(partial(decode, work), num_ranks)):
            if "error" in row:
                note(path, row)
                continue
            alone = first.setdefault((row["dtype"], row["size"]), row["seconds"])
            what = f"{row['ranks']} ranks, {row['dtype']}, {row['size']}"
            print(f"{what}: {row['seconds']:.3f} s, {alone / row['seconds']:.3f} times as fast")

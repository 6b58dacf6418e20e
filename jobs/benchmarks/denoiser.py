"""Attention, compilation and fusing of the denoiser beside stock diffusers in one process; prints JSON lines.

python jobs/bench.py denoiser forward --shape wan2.1-t2v-14b --size 480x832x81     # one forward, every option
python jobs/bench.py denoiser step --shape wan2.1-i2v-14b-480p                     # a guided step; also --precision fp8
python jobs/bench.py denoiser stages --shape wan2.2-t2v-a14b --size 720x1280x81    # encode, steps, decode; exact, fast
python jobs/bench.py denoiser drift --shape wan2.1-t2v-1.3b                        # latents after 4, 20 and 50 steps
python jobs/bench.py denoiser psnr                                                 # frames of the tiny trained model
python jobs/bench.py denoiser profile --options "stock/flash_4, compile"           # seconds by kernel
python jobs/bench.py denoiser forward --quick                                      # a CPU, a tiny model: that it runs

Weights are random and made on the device. Options are measured in turn, over and over, so that none has the cooler
chip; each line holds the median so far, and the last line of an option counts. `--seconds` bounds the whole.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.denoiser_model import FEW, OPTIONS, TEXT_TOKENS, Model, tune
from benchmarks.machine import machine, note, now
from benchmarks.stage_report import psnr

from disagg_ray import LocalPipeline, Request
from disagg_ray.config.options import VaeConfig
from disagg_ray.models.tuning import tune_vae
from disagg_ray.models.wan.random import build_component
from disagg_ray.models.wan.shapes import get_shape

Row = dict[str, Any]
Work = Callable[[], torch.Tensor]
FAST_VAE = VaeConfig(channels_last=True, compile=True)


class Bench:
    """Options of the command line, and lines of JSON out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "cpu" if options.quick else "cuda"
        self.ends = time.monotonic() + options.seconds
        options.output.mkdir(parents=True, exist_ok=True)
        self.path = options.output / f"bench_denoiser_{options.what}_{options.shape}_{options.size}.jsonl"
        self.path.write_text("")
        self.shape = get_shape("tiny-i2v" if options.what == "step" else "tiny-t2v") if options.quick else None
        self.shape = self.shape or get_shape(options.shape)
        self.size = (64, 64, 9) if options.quick else tuple(int(number) for number in options.size.split("x"))

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.ends

    def add(self, **row: Any) -> None:
        memory = {}
        if self.device == "cuda":
            peaks = {"peak_gb": torch.cuda.max_memory_allocated(), "held_gb": torch.cuda.max_memory_reserved()}
            memory = {name: number / 1e9 for name, number in peaks.items()}
        note(self.path, {"what": self.options.what, "shape": self.shape.name, "size": self.size} | row | memory)

    def now(self) -> float:
        return now(self.device == "cuda")

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        began = self.now()
        made = work()
        return self.now() - began, made

    def model(self) -> Model:
        return Model(self.shape, self.size, self.device)

    def ready(self, model: Model, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Apply options for the first time and yield those that work, with what brings them back."""
        for name in names:
            began = self.now()
            try:
                state = model.apply(OPTIONS[name])
                model.forward()
            except Exception as error:  # noqa: BLE001 - one option that fails is a row, the others go on
                model.restore()
                self.add(option=name, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
                continue
            self.add(option=name, ready_s=self.now() - began)
            yield name, state
            if time.monotonic() > self.ends - 0.35 * self.options.seconds:
                return  # the rest is for measuring what is ready


def difference(made: torch.Tensor, expected: torch.Tensor) -> Row:
    """Return how far a tensor is from stock's: of the root mean square, and at most, over stock's."""
    made, expected = made.double(), expected.double()
    scale = expected.square().mean().sqrt()
    apart = made - expected
    return {"rms": float(apart.square().mean().sqrt() / scale), "max": float(apart.abs().max() / scale)}


def interleave(
    bench: Bench,
    model: Model,
    states: dict[str, Any],
    work: Work,
    expected: torch.Tensor | None = None,
    stock_s: float | None = None,
    **about: Any,
) -> None:
    """Time each option's work in turn, and print its median, its share of stock's and its difference after each.

    Stock is one of the options, or `expected` and `stock_s` are what it made and its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(bench.options.repeats):
        for name, state in states.items():
            if not bench.in_time:
                return
            model.restore(state)
            taken, made = bench.time(work)
            seconds[name].append(taken)
            row: Row = {"option": name, "seconds": statistics.median(seconds[name]), "repeats": len(seconds[name])}
            if name == "stock":
                expected, stock_s = made, row["seconds"]
            if expected is not None and stock_s is not None:
                row |= {"of_stock": row["seconds"] / stock_s, "difference": difference(made, expected)}
            bench.add(**about, **row)


def names(bench: Bench, default: Sequence[str]) -> list[str]:
    return bench.options.options.split("/") if bench.options.options else list(default)


def forward(bench: Bench) -> None:
    """Time one forward by option."""
    model = bench.model()
    interleave(bench, model, dict(bench.ready(model, names(bench, OPTIONS))), model.forward)


def step(bench: Bench) -> None:
    """Time a guided step by option, in bfloat16 or, beside stock's in bfloat16, with matrix products in 8 bits."""
    model, fp8 = bench.model(), bench.options.precision == "fp8"
    tuned = [name for name in names(bench, FEW) if name != "stock"]

    def work() -> torch.Tensor:
        return model.denoise(50, most=1, guided=True)

    if not fp8:
        interleave(bench, model, dict(bench.ready(model, ["stock", *tuned])), work, precision="bf16")
        return
    expected = work()
    taken = statistics.median(bench.time(work)[0] for _ in range(bench.options.repeats))
    bench.add(precision="bf16", option="stock", seconds=taken, repeats=bench.options.repeats)
    tune(quantization="fp8")(model)
    interleave(bench, model, dict(bench.ready(model, tuned)), work, expected, taken, precision="fp8")


def drift(bench: Bench) -> None:
    """Say how far the latents are from stock's after 4, 20 and 50 unguided steps."""
    model = bench.model()
    states = dict(bench.ready(model, names(bench, ("stock", "flash_4", "compile", FEW[-1]))))
    for num_steps in (2,) if bench.options.quick else (4, 20, 50):
        found: dict[str, torch.Tensor] = {}
        for name, state in states.items():
            if not bench.in_time:
                return
            model.restore(state)
            found[name] = model.denoise(num_steps)
            expected = found["stock"]
            peak = float(expected.max() - expected.min())
            apart = difference(found[name], expected)
            bench.add(option=name, steps=num_steps, difference=apart, psnr_db=psnr(found[name], expected, peak))


def profile(bench: Bench) -> None:
    """Print the kernels of one forward by option, those that take the most first."""
    from torch.profiler import ProfilerActivity

    model = bench.model()
    for name, _ in bench.ready(model, names(bench, ("stock", FEW[-2], FEW[-1]))):
        model.forward()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            model.forward()
            bench.now()
        kernels = [event for event in found.key_averages() if event.self_device_time_total]
        kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
        for event in kernels[:25]:
            taken = event.self_device_time_total / 1e3
            bench.add(option=name, kernel=event.key[:150], ms=round(taken, 2), calls=event.count)


def stages(bench: Bench) -> None:
    """Time encode, a step and decode of one request, with stock's options and with the fast ones."""
    latents = time_denoise(bench)
    free()
    time_others(bench, latents)


def time_denoise(bench: Bench) -> torch.Tensor:
    model, many, guided = bench.model(), bench.options.steps, bench.options.guidance > 1

    def work() -> torch.Tensor:
        return model.denoise(50, most=1, guided=guided)

    for name, state in bench.ready(model, names(bench, ("stock", FEW[-1]))):
        model.restore(state)
        each = time_stage(bench, work)
        bench.add(stage="denoise", option=name, seconds_a_step=each, steps=many, seconds=each * many)
    return model.latents.float()


@torch.inference_mode()
def time_others(bench: Bench, latents: torch.Tensor) -> None:
    """Time decode, and the encodes of image and text."""
    for name, dtype, options in (("stock", torch.float32, None), ("fast", torch.float16, FAST_VAE)):
        vae = component(bench, "vae", dtype)
        if options is not None:
            tune_vae(vae, options)
        video = torch.zeros(1, 3, bench.size[2], *bench.size[:2], dtype=dtype, device=bench.device)
        works = {"decode": lambda vae=vae, dtype=dtype: vae.decode(latents.to(dtype), return_dict=False)[0]}
        if bench.shape.takes_image:
            works["encode image"] = lambda vae=vae, video=video: vae.encode(video).latent_dist.mode()
        for stage, work in works.items():
            bench.add(stage=stage, option=name, seconds=time_stage(bench, work))
        del vae, works
        free()
    encoder = component(bench, "text_encoder", torch.bfloat16)
    tokens = torch.ones(1, TEXT_TOKENS, dtype=torch.long, device=bench.device)
    seconds = time_stage(bench, lambda: encoder(tokens).last_hidden_state)
    bench.add(stage="encode text", option="stock", seconds=seconds)


def time_stage(bench: Bench, work: Work) -> float:
    """Return the median seconds of a stage's work, after a first time that is not counted; peaks begin with it."""
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench.time(work)
    return statistics.median(bench.time(work)[0] for _ in range(bench.options.repeats))


def component(bench: Bench, name: str, dtype: torch.dtype) -> Any:
    """Return another component of random weights, on the device."""
    return build_component(bench.shape, name, str(dtype).split(".")[1], bench.device)


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trained(bench: Bench) -> None:
    """Say how far frames of the tiny trained model are from exact ones, by preset, number of steps and seed."""
    on_gpu = int(bench.device == "cuda")
    places = [f"stages.{stage}.num_gpus={on_gpu}" for stage in ("encoder", "transformer", "decoder")]
    places += ["cluster.num_gpus=null", "model.dtype.transformer=bfloat16"]
    exact: dict[tuple[int, int], torch.Tensor] = {}
    for speed in ("exact", "fast", "smallest"):
        pipeline = LocalPipeline.from_config("conf/tiny_t2v.yaml", *places, f"speed={speed}")
        for count, seed in itertools.product((2,) if bench.options.quick else (4, 20, 50), range(4)):
            request = Request("a red circle moving left", seed=seed, num_inference_steps=count, format="npy")
            made = torch.as_tensor(pipeline.generate(request).frames).float()
            expected = exact.setdefault((count, seed), made)
            bench.add(option=speed, steps=count, seed=seed, psnr_db=psnr(made, expected, 1.0))
        del pipeline
        free()


WHATS = {"forward": forward, "step": step, "stages": stages, "drift": drift, "psnr": trained, "profile": profile}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("--shape", default="wan2.1-t2v-1.3b", help="of a published model")
    parser.add_argument("--size", default="480x832x81", help="HEIGHTxWIDTHxFRAMES")
    parser.add_argument("--options", default="", help=f"separated by /, of: {' / '.join(OPTIONS)}")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="step: of the matrix products")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="stages: to which the seconds of a step are multiplied")
    parser.add_argument("--guidance", type=float, default=5.0, help="stages: 1 is none")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which nothing is begun")
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder")
    options = parser.parse_args(arguments)
    most = 1000  # graphs, of all options
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = most
    bench = Bench(options)
    bench.add(machine=machine())
    WHATS[options.what](bench)

"""Attention, compilation and fusing of the denoiser beside stock diffusers in one process; prints JSON lines.

python jobs/bench.py denoiser forward --shape wan2.1-t2v-14b --size 480x832x81     # one forward, every option
python jobs/bench.py denoiser step --shape wan2.1-i2v-14b-480p                     # a guided step; bf16, then fp8
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
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import machine
from diffusers import UniPCMultistepScheduler

from disagg_ray import LocalPipeline, Request
from disagg_ray.config.options import DenoiserConfig, VaeConfig
from disagg_ray.errors import ConfigError
from disagg_ray.models.attention import set_attention
from disagg_ray.models.tuning import tune_transformer, tune_vae
from disagg_ray.models.wan.fusing import fuse_activation, fuse_rotary
from disagg_ray.models.wan.random import build_random
from disagg_ray.models.wan.shapes import Shape, get_shape

Row = dict[str, Any]
Work = Callable[[], torch.Tensor]
TEXT_TOKENS = 512
GUIDANCE = 5.0
FAST_VAE = VaeConfig(channels_last=True, compile=True)


class Model:
    """A transformer of random weights with inputs of one size, to which options are applied and taken back."""

    def __init__(self, shape: Shape, size: Sequence[int], device: str) -> None:
        self.shape, self.config, self.device = shape, shape.transformer, device
        self.dtype = torch.bfloat16
        self.transformer = build_random(self.config, "bfloat16", device)
        height, width, num_frames = size
        self.latents = self.draw(1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
        self.texts = [self.draw(1, TEXT_TOKENS, self.config.text_dim) for _ in range(2)]
        rest = self.config.in_channels - 16
        self.condition = self.draw(1, rest, *self.latents.shape[2:]) if rest else None
        tokens = shape.image_encoder.num_tokens if shape.image_encoder else 0
        self.image = self.draw(1, tokens, self.config.image_dim) if self.config.image_dim else None
        self._plain = self._state()

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, latents: torch.Tensor | None = None, timestep: float = 700.0, text: int = 0) -> torch.Tensor:
        latents = self.latents if latents is None else latents.to(self.dtype)
        joined = latents if self.condition is None else torch.cat([latents, self.condition], dim=1)
        images = {} if self.image is None else {"encoder_hidden_states_image": self.image}
        made: torch.Tensor = self.transformer(
            joined, torch.tensor([timestep], device=self.device), self.texts[text], return_dict=False, **images
        )[0]
        return made

    @torch.inference_mode()
    def denoise(self, num_steps: int, *, most: int | None = None, guided: bool = False) -> torch.Tensor:
        """Run the first `most` of that many steps, by Wan's own scheduler."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shape.scheduler.flow_shift
        )
        scheduler.set_timesteps(num_steps, device=self.device)
        latents = self.latents.float()
        for timestep in scheduler.timesteps[:most]:
            made = self.forward(latents, float(timestep))
            if guided:
                other = self.forward(latents, float(timestep), 1)
                made = other + GUIDANCE * (made - other)
            latents = scheduler.step(made, timestep, latents, return_dict=False)[0]
        return latents

    def restore(self, state: Sequence[tuple[Any, dict[str, Any]]] | None = None) -> None:
        """Take an option back, or put one that was applied before into effect again."""
        for owner, attributes in self._state():
            for name in attributes:
                vars(owner).pop(name, None)
        for owner, attributes in state or self._plain:
            vars(owner).update(attributes)

    def apply(self, option: Callable[[Model], None]) -> list[tuple[Any, dict[str, Any]]]:
        """Apply an option to the plain model and return its state for `restore`."""
        self.restore()
        option(self)
        return self._state()

    def _state(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return what options change, by owner: calls, attention processors and their backends."""
        found = []
        for module in self.transformer.modules():
            found.append((module, {n: v for n, v in vars(module).items() if n in CHANGED}))
            if (processor := vars(module).get("processor")) is not None:
                found.append((processor, {n: v for n, v in vars(processor).items() if n == "_attention_backend"}))
        return found


CHANGED = ("forward", "processor", "fused_projections")


def tune(**options: Any) -> Callable[[Model], None]:
    """Return an option of the configuration."""

    def apply(model: Model) -> None:
        sizes = [model.latents]
        tune_transformer("denoiser", "transformer", model.transformer, DenoiserConfig(**options), sizes, TEXT_TOKENS)

    return apply


def compiled(*parts: Callable[[Any], None], mode: str | None = None, **options: Any) -> Callable[[Model], None]:
    """Return FlashAttention 4 with some fusing, each block compiled by a mode or inductor's options."""

    def apply(model: Model) -> None:
        flash(model)
        for part in parts:
            part(model.transformer)
        for block in model.transformer.blocks:
            block.forward = torch.compile(block.forward, mode=mode, options=options or None, fullgraph=True)

    return apply


def flash(model: Model) -> None:
    set_attention("", model.transformer, "flash_4" if model.device == "cuda" else "native")


def quack(tuned: bool) -> Callable[[Any], None]:
    """Return an option that takes matrix products from quack-kernels, which comes with flash-attn-4."""

    def apply(transformer: Any) -> None:
        from quack.gemm_interface import gemm, gemm_act

        def product(linear: Any, x: torch.Tensor) -> torch.Tensor:
            made = gemm(x.flatten(0, -2), linear.weight.t(), bias=linear.bias, tuned=tuned)
            return made.unflatten(0, x.shape[:-1])

        def product_gelu(linear: Any, x: torch.Tensor) -> torch.Tensor:
            rows, activation = x.flatten(0, -2), "gelu_tanh_approx"
            _, made = gemm_act(
                rows, linear.weight.t(), bias=linear.bias, activation=activation, store_preact=False, tuned=tuned
            )
            return made.unflatten(0, x.shape[:-1])

        for block in transformer.blocks:
            own = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0]]
            for linear in (*own, block.attn2.to_q, block.attn2.to_out[0], block.ffn.net[2]):
                linear.forward = lambda x, linear=linear: product(linear, x)
            block.ffn.net[0].forward = lambda x, linear=block.ffn.net[0].proj: product_gelu(linear, x)

    return apply


def fuse_projections(transformer: Any) -> None:
    for block in transformer.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()


DESCENT = {"coordinate_descent_tuning": True}
OPTIONS: dict[str, Callable[[Model], None]] = {
    "stock": lambda model: None,
    "flash_4": flash,
    "compile": tune(compile="default"),
    "auto, compile": tune(attention="auto", compile="default"),
    "flash_4, compile": compiled(),
    "flash_4, gelu": lambda model: (flash(model), fuse_activation(model.transformer))[0],
    "flash_4, compile, gelu": compiled(fuse_activation),
    "flash_4, compile, rotary": compiled(fuse_rotary),
    "flash_4, compile, gelu, rotary": compiled(fuse_activation, fuse_rotary),
    "flash_4, compile, gelu, rotary, descent": compiled(fuse_activation, fuse_rotary, **DESCENT),
    "flash_4, compile, gelu, rotary, qkv": compiled(fuse_activation, fuse_rotary, fuse_projections),
    "flash_4, compile, rotary, max": compiled(fuse_rotary, mode="max-autotune-no-cudagraphs"),
    "flash_4, compile, rotary, quack": compiled(fuse_rotary, quack(tuned=False)),
    "flash_4, compile, rotary, quack tuned": compiled(fuse_rotary, quack(tuned=True)),
}
"""Each of them is applied to a plain model; `--options` picks some by name."""
FEW = ("stock", "flash_4", "compile", "auto, compile", "flash_4, compile", "flash_4, compile, gelu, rotary")


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
        memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if self.device == "cuda" else {}
        text = json.dumps({"what": self.options.what, "shape": self.shape.name, "size": self.size} | row | memory)
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

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


def psnr(made: torch.Tensor, expected: torch.Tensor, peak: float) -> float | None:
    error = float((made.double() - expected.double()).square().mean())
    return None if error == 0 else float(10 * torch.log10(torch.tensor(peak**2 / error)))


def interleave(bench: Bench, model: Model, states: dict[str, Any], work: Work, **about: Any) -> None:
    """Time each option's work in turn, and print its median, its share of stock's and its difference after each."""
    seconds: dict[str, list[float]] = {name: [] for name in states}
    expected = None
    for _ in range(bench.options.repeats):
        for name, state in states.items():
            if not bench.in_time:
                return
            model.restore(state)
            taken, made = bench.time(work)
            seconds[name].append(taken)
            expected = made if name == "stock" else expected
            row: Row = {"option": name, "seconds": statistics.median(seconds[name]), "repeats": len(seconds[name])}
            if expected is not None and seconds.get("stock"):
                row["of_stock"] = row["seconds"] / statistics.median(seconds["stock"])
                row["difference"] = difference(made, expected)
            bench.add(**about, **row)


def names(bench: Bench, default: Sequence[str]) -> list[str]:
    return bench.options.options.split("/") if bench.options.options else list(default)


def forward(bench: Bench) -> None:
    """Time one forward by option."""
    model = bench.model()
    interleave(bench, model, dict(bench.ready(model, names(bench, OPTIONS))), model.forward)


def step(bench: Bench) -> None:
    """Time a guided step by option, in bfloat16 and then with matrix products in 8 bits."""
    model = bench.model()

    def work() -> torch.Tensor:
        return model.denoise(50, most=1, guided=True)

    states = dict(bench.ready(model, names(bench, FEW)))
    interleave(bench, model, states, work, precision="bf16")
    model.restore()
    expected = work()
    try:
        tune(quantization="fp8")(model)
    except ConfigError as error:
        bench.add(precision="fp8", error=str(error))
        return
    for name, state in bench.ready(model, list(states)):
        taken = [bench.time(lambda: (model.restore(state), work())[1]) for _ in range(bench.options.repeats)]  # noqa: B023
        found = {"seconds": statistics.median(seconds for seconds, _ in taken)}
        bench.add(precision="fp8", option=name, **found, difference=difference(taken[-1][1], expected))


def drift(bench: Bench) -> None:
    """Say how far the latents are from stock's after 4, 20 and 50 unguided steps."""
    model = bench.model()
    states = dict(bench.ready(model, names(bench, ("stock", "flash_4", "compile", FEW[-1]))))
    for num_steps in (4, 20, 50):
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
    """Time encode, a few steps and decode of one request, with stock's options and with the fast ones."""
    latents = time_denoise(bench)
    free()
    time_others(bench, latents)


def time_denoise(bench: Bench) -> torch.Tensor:
    model, many, guided = bench.model(), bench.options.steps, bench.options.guidance > 1

    def work() -> torch.Tensor:
        return model.denoise(50, most=2, guided=guided)

    for name, state in bench.ready(model, names(bench, ("stock", FEW[-1]))):
        model.restore(state)
        each = time_stage(bench, work) / 2
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
    from disagg_ray.models.wan.random import build_component

    return build_component(bench.shape, name, str(dtype).split(".")[1], bench.device)


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trained(bench: Bench) -> None:
    """Say how far frames of the tiny trained model are from exact ones, by preset and number of steps."""
    places = [
        f"stages.{stage}.num_gpus={int(bench.device == 'cuda')}" for stage in ("encoder", "transformer", "decoder")
    ]
    places += ["cluster.num_gpus=null", "model.dtype.transformer=bfloat16"]
    counts = (2,) if bench.options.quick else (4, 20, 50)
    frames: dict[tuple[str, int], torch.Tensor] = {}
    for speed in ("exact", "fast", "smallest"):
        pipeline = LocalPipeline.from_config("conf/tiny_t2v.yaml", *places, f"speed={speed}")
        for count in counts:
            requests = [Request("a red circle moving left", seed=seed, num_inference_steps=count) for seed in range(4)]
            made = torch.stack([torch.as_tensor(pipeline.generate(request).frames) for request in requests])
            frames[speed, count] = made
            bench.add(option=speed, steps=count, psnr_db=psnr(made, frames["exact", count], 1.0))
        del pipeline
        free()


WHATS = {"forward": forward, "step": step, "stages": stages, "drift": drift, "psnr": trained, "profile": profile}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("--shape", default="wan2.1-t2v-1.3b", help="of a published model")
    parser.add_argument("--size", default="480x832x81", help="HEIGHTxWIDTHxFRAMES")
    parser.add_argument("--options", default="", help=f"separated by /, of: {' / '.join(OPTIONS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="stages: to which the seconds of a step are multiplied")
    parser.add_argument("--guidance", type=float, default=5.0, help="stages: 1 is none")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which nothing is begun")
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder")
    options = parser.parse_args(arguments)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = (
        1000  # all options' graphs
    )
    bench = Bench(options)
    bench.add(machine=machine())
    WHATS[options.what](bench)

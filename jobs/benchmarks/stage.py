"""Each stage's speed and error by option, beside stock diffusers in the same process; prints a table, writes JSON.

disagg-ray make-checkpoint wan2.1-t2v-1.3b CKPT --dtype bfloat16 --device cuda
python jobs/bench.py stage CKPT        # one GPU, Wan 1.3B at 480x832x81, under 8 minutes
python jobs/bench.py stage --quick     # a CPU, a tiny model: that it runs

Weights are random, so an error says how far the numbers drift, not how a video looks.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import machine, now
from benchmarks.pipelines import load_stock_pipeline
from benchmarks.stage_options import DECODES, MAIN, OTHERS, WHOLE
from benchmarks.stage_report import Row, line, psnr, relative, table

from disagg_ray import Request, load_config
from disagg_ray.environment import cache_folder
from disagg_ray.graph import build_graph
from disagg_ray.models.random import make_checkpoint
from disagg_ray.replica.stage import Stage
from disagg_ray.request import ResolvedRequest, resolve

STAGES = ("encoder", "transformer", "decoder")
DTYPES = {"text_encoder": "bfloat16", "transformer": "bfloat16", "vae": "float32"}


@dataclass
class Bench:
    """What every case shares: the stock pipeline, its inputs and its answers."""

    folder: Path
    config: Path
    size: tuple[int, int, int]
    device: str
    few: int
    many: int
    ends: float
    only: tuple[str, ...] = ()
    stock: Any = None
    rows: list[Row] = field(default_factory=list)
    frames: torch.Tensor | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    answers: dict[tuple[int, bool], tuple[torch.Tensor, float]] = field(default_factory=dict)

    def now(self) -> float:
        return now(self.device == "cuda")

    def stage(self, name: str, *overrides: str) -> tuple[Stage, float]:
        """Start one stage; return it with the seconds from nothing to ready."""
        height, width, num_frames = self.size
        common = [f"model.path={self.folder}", *(f"stages.{s}.device={self.device}" for s in STAGES)]
        common += [f"stages.{s}.num_threads={torch.get_num_threads()}" for s in STAGES]
        common += [f"model.dtype.{component}={dtype}" for component, dtype in DTYPES.items()]
        common += [f"stages.{name}.warm_up=[[{height},{width},{num_frames}]]", "model.max_sequence_length=512"]
        config = load_config(self.config, *common, *overrides)
        stages = {s: Stage(s, config) for s in STAGES}
        graph = build_graph([stage.ports for stage in stages.values()])
        started = self.now()
        stage = stages[name]
        stage.connect(graph)
        stage.load()
        return stage, self.now() - started

    def request(self, stage: Stage, steps: int, *, guided: bool) -> ResolvedRequest:
        height, width, num_frames = self.size
        scale = 5.0 if guided else 1.0
        asked = Request("a cat", "blur", None, None, height, width, num_frames, steps, scale, seed=0, format="npy")
        return resolve(asked, stage.config)[0]

    def embeds(self) -> dict[str, torch.Tensor]:
        """Return made-up embeddings of a prompt and of a negative one."""
        shape = (1, 512, self.stock.transformer.config.text_dim)
        dtype = getattr(torch, DTYPES["text_encoder"])
        return {
            name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)
            for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
        }

    def latents(self) -> torch.Tensor:
        height, width, num_frames = self.size
        shape = (1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(self.device)

    def denoise_stock(self, steps: int, *, guided: bool) -> torch.Tensor:
        height, width, num_frames = self.size
        made: torch.Tensor = self.stock(
            **self.embeds(), height=height, width=width, num_frames=num_frames, num_inference_steps=steps,
            guidance_scale=5.0 if guided else 1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames  # fmt: skip
        return made

    def denoise(self, stage: Stage, steps: int, *, guided: bool) -> torch.Tensor:
        embeds = self.embeds()
        if not guided:
            del embeds["negative_prompt_embeds"]
        return stage.compute(self.request(stage, steps, guided=guided), embeds, None).tensors["latents"]

    @torch.inference_mode()
    def forward(self, transformer: Any) -> torch.Tensor:
        dtype = getattr(torch, DTYPES["transformer"])
        inputs = {"hidden_states": self.latents().to(dtype), "timestep": torch.tensor([700], device=self.device)}
        embeds = self.embeds()["prompt_embeds"].to(dtype)
        made: torch.Tensor = transformer(**inputs, encoder_hidden_states=embeds, return_dict=False)[0]
        return made

    @torch.inference_mode()
    def decode_stock(self, latents: torch.Tensor) -> torch.Tensor:
        """Return frames as the last lines of `WanPipeline.__call__` do."""
        config = self.stock.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(self.device)
            for values in (config.latents_mean, config.latents_std)
        )
        video = self.stock.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return torch.from_numpy(self.stock.video_processor.postprocess_video(video, output_type="np"))[0]

    def answer(self, steps: int, *, guided: bool) -> tuple[torch.Tensor, float]:
        """Return the stock pipeline's latents and the seconds they took, computed once."""
        if (steps, guided) not in self.answers:
            started = self.now()
            made = self.denoise_stock(steps, guided=guided)
            self.answers[steps, guided] = made, self.now() - started
        return self.answers[steps, guided]

    def errors(self, made: torch.Tensor, steps: int, *, guided: bool) -> Row:
        """Return how far latents are from the stock pipeline's, and their frames, decoded alike."""
        expected, _ = self.answer(steps, guided=guided)
        frames = [self.decode_stock(latents) for latents in (made, expected)]
        return {"steps": steps, "relative_l2": relative(made, expected), "latents_psnr_db": psnr(made, expected),
                "frames_psnr_db": psnr(*frames, peak=1.0)}  # fmt: skip

    def case(self, kind: str, name: str, measure: Callable[[], Row]) -> None:
        """Add a case's row to the table; one that fails or comes too late says so there."""
        if self.only and kind != "stock" and not any(word in f"{kind} {name}" for word in self.only):
            return
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = self.now()
        if time.monotonic() > self.ends:
            row: Row = {"error": "left out: no time"}
        else:
            try:
                row = measure()
            except Exception as error:  # noqa: BLE001 - one option that fails is a row, the others go on
                row = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        gc.collect()
        torch.backends.cudnn.benchmark = False
        torch._dynamo.reset()
        row |= {"kind": kind, "case": name, "took_s": time.perf_counter() - started}
        if self.device == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
            torch.cuda.empty_cache()
        self.rows.append(row)
        print(line(row), flush=True)


def load_stock(bench: Bench) -> Row:
    """Load the whole stock pipeline, its components one after the other."""
    started = bench.now()
    bench.stock = load_stock_pipeline(bench.folder, DTYPES, bench.device)
    ready_s = bench.now() - started
    bench.denoise_stock(1, guided=False)
    return {"ready_s": ready_s}


def beside_stock(bench: Bench, kind: str, ours: Callable[[], Any], stocks: Callable[[], Any], repeats: int) -> Row:
    """Time two calls in turn, so that neither has the cooler chip; stock's only in the first case of a kind."""
    times: dict[str, list[float]] = {"stage_s": [], "stock_s": []}
    works = {"stage_s": ours} if kind in bench.baselines else {"stage_s": ours, "stock_s": stocks}
    for _ in range(repeats + 1):
        for name, work in works.items():
            started = bench.now()
            work()
            times[name].append(bench.now() - started)
    stage_s = statistics.median(times["stage_s"][1:])
    stock_s = bench.baselines.setdefault(kind, statistics.median(times["stock_s"][1:] or [0.0]))
    return {"stage_s": stage_s, "stock_s": stock_s, "of_stock": stage_s / stock_s}


def options_off(bench: Bench, name: str) -> Row:
    """Time a whole stage with every option off against the same work of the stock pipeline."""
    stage, ready_s = bench.stage(name)
    request, latents = bench.request(stage, bench.few, guided=True), bench.latents()
    if name == "transformer":
        pair = (
            lambda: bench.denoise(stage, bench.few, guided=True),
            lambda: bench.denoise_stock(bench.few, guided=True),
        )
    elif name == "decoder":
        pair = (lambda: stage.compute(request, {"latents": latents}, None), lambda: bench.decode_stock(latents))
    else:
        pair = (lambda: stage.compute(request, {}, None), lambda: encode_stock(bench))
    return {"ready_s": ready_s} | beside_stock(bench, f"whole {name}", *pair, repeats=10 if name == "encoder" else 2)


@torch.inference_mode()
def encode_stock(bench: Bench) -> Any:
    return bench.stock.encode_prompt("a cat", "blur", max_sequence_length=512, device=bench.device)


def denoiser(bench: Bench, overrides: tuple[str, ...], *step_counts: int) -> Row:
    """Time a forward of the transformer under some options, and its error after some steps."""
    stage, ready_s = bench.stage("transformer", *overrides)
    transformer = stage.component("transformer")
    pair = (lambda: bench.forward(transformer), lambda: bench.forward(bench.stock.transformer))
    row = beside_stock(bench, "forward", *pair, repeats=5)
    errors = [bench.errors(bench.denoise(stage, n, guided=False), n, guided=False) for n in step_counts]
    return {"ready_s": ready_s, **row, "errors": errors}


def whole(bench: Bench, overrides: tuple[str, ...]) -> Row:
    """Time a whole guided denoise: with a step cache no two steps cost the same."""
    stage, ready_s = bench.stage("transformer", *overrides)
    _, stock_s = bench.answer(bench.many, guided=True)
    bench.denoise(stage, 2, guided=True)
    started = bench.now()
    made = bench.denoise(stage, bench.many, guided=True)
    stage_s = bench.now() - started
    row = {"ready_s": ready_s, "stage_s": stage_s, "stock_s": stock_s, "of_stock": stage_s / stock_s}
    return row | {"errors": [bench.errors(made, bench.many, guided=True)]}


def decoder(bench: Bench, overrides: tuple[str, ...]) -> Row:
    """Time `vae.decode` under some options, and the error of its frames."""
    stage, ready_s = bench.stage("decoder", *overrides)
    vae, latents = stage.component("vae"), bench.latents()

    @torch.inference_mode()
    def decode(model: Any) -> Any:
        return model.decode(latents.to(model.dtype))

    request = bench.request(stage, 1, guided=False)
    made = stage.compute(request, {"latents": latents}, None).frames
    row = beside_stock(bench, "decode", lambda: decode(vae), lambda: decode(bench.stock.vae), repeats=3)
    if bench.frames is None:
        bench.frames = bench.decode_stock(latents)
    return {"ready_s": ready_s, **row, "frames_psnr_db": psnr(torch.as_tensor(made), bench.frames, peak=1.0)}


def measure(bench: Bench) -> None:
    """Run every case, the ones that the aims speak of first."""
    bench.case("stock", "load", lambda: load_stock(bench))
    for name in ("transformer", "decoder", "encoder"):
        bench.case("stage", f"{name}, options off", lambda name=name: options_off(bench, name))
    for name, overrides in MAIN.items():
        counts = (bench.few, bench.many) if "compile" in name else (bench.few,)
        bench.case("forward", name, lambda o=overrides, c=counts: denoiser(bench, o, *c))
    for name, overrides in DECODES.items():
        bench.case("decode", name, lambda o=overrides: decoder(bench, o))
    for name, overrides in WHOLE.items():
        bench.case("denoise", name, lambda o=overrides: whole(bench, o))
    for name, overrides in OTHERS.items():
        bench.case("forward", name, lambda o=overrides: denoiser(bench, o, bench.few))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder; left out with --quick")
    parser.add_argument("--config", default="conf/wan21_t2v_1_3b.yaml", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--seconds", type=float, default=430.0, help="after which no case begins")
    parser.add_argument("--only", default="", help="words of a case's name or kind, comma separated")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    if options.quick:
        folder = make_checkpoint("tiny-t2v", cache_folder() / "random" / "tiny-t2v")
        bench = Bench(folder, Path("conf/tiny_t2v.yaml"), (64, 64, 9), "cpu", 2, 20, ends)
    elif options.checkpoint is None:
        parser.error("give the folder of a checkpoint, or --quick")
    else:
        bench = Bench(options.checkpoint, options.config, (480, 832, 81), "cuda", 4, 20, ends)
    bench.only = tuple(filter(None, options.only.split(",")))
    measure(bench)
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "size": bench.size, "dtypes": DTYPES, "rows": bench.rows}
    (options.output / "bench_stage.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + table(bench.rows))

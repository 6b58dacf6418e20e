"""The baseline: stock diffusers pipelines, one a process and a GPU, each with a thread that writes its files."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.pipelines import load_stock_pipeline

from disagg_ray.config.schema import Config
from disagg_ray.media.output import write
from disagg_ray.media.video import Frames, encode
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.tuning import tune_transformer, tune_vae

START_S = 600.0
"""Until a pipeline must have loaded."""
OFFLOADS = ("model", "group", "sequential")
"""diffusers' ways to keep weights in host memory."""
PROMPT = "a red circle moving left"


@dataclass(frozen=True)
class Cell:
    """What every request of one measurement asks for, beside the configured size."""

    steps: int
    guidance: float

    @property
    def name(self) -> str:
        return f"{self.steps} steps, {'guided' if self.guidance > 1 else 'unguided'}"


@dataclass(frozen=True)
class Video:
    """When one video was begun, computed and written, by this machine's monotonic clock."""

    began: float
    computed: float
    written: float


@dataclass(frozen=True)
class Stock:
    """How the pipelines are set up."""

    config: Config
    format: str
    offload: str = ""
    """Nothing, or one of OFFLOADS."""
    max_vram_bytes: int | None = None
    """Most memory of the GPU that torch may take."""
    is_tuned: bool = False
    """Whether the options of the configuration's stages are set by hand on its models."""


class StockPipelines:
    """Processes with a pipeline each; ends them when it is left."""

    def __init__(self, stock: Stock, count: int) -> None:
        began = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._children = []
        for index in range(count):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, stock, index), daemon=True)
            child.start()
            theirs.close()
            self._ends.append(ours)
            self._children.append(child)
        try:
            self.load_s = self._gather(START_S)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - began

    def run(self, cell: Cell, count: int, most: int | None = None) -> list[list[Video]]:
        """Have each pipeline, or the first few, make so many videos; return them by pipeline."""
        for end in self._ends[:most]:
            end.send((cell, count))
        return self._gather(START_S, most)

    def peak_bytes(self) -> list[int]:
        for end in self._ends:
            end.send(None)
        return self._gather(START_S)

    def _gather(self, timeout_s: float, most: int | None = None) -> list[Any]:
        answers = []
        for end in self._ends[:most]:
            if not end.poll(timeout_s):
                raise TimeoutError(f"a stock pipeline gave no answer for {timeout_s:g} s")
            try:
                answers.append(end.recv())
            except EOFError:
                raise RuntimeError("a stock pipeline's process died: perhaps the host's memory was full") from None
        failures = [answer for answer in answers if isinstance(answer, str)]
        if failures:
            raise RuntimeError(failures[0])
        return answers

    def __enter__(self) -> StockPipelines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for end, child in zip(self._ends, self._children, strict=True):
            end.close()
            child.kill()
            child.join()


def per_minute(written: Sequence[Sequence[float]]) -> float:
    """Return the videos a minute of GPUs together in steady state: each by its own from its first to its last.

    `written` has, for each, the seconds at which its videos were there; one alone tells nothing.
    """
    return sum(60 * (len(mine) - 1) / (max(mine) - min(mine)) for mine in written if len(mine) > 1)


def _serve(connection: Connection, stock: Stock, index: int) -> None:
    """Load, then answer until the other end closes; what fails is answered as text."""
    try:
        began = time.monotonic()
        pipeline, device = _load(stock, index)
        connection.send(time.monotonic() - began)
        while True:
            asked = connection.recv()
            if asked is None:
                connection.send(torch.cuda.max_memory_reserved() if device != "cpu" else 0)
            else:
                connection.send(_make(pipeline, stock, index, *asked))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
        connection.send(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def _load(stock: Stock, index: int) -> tuple[Any, str]:
    config = stock.config
    folder = open_checkpoint(config.model).folder
    stage_of = {"text_encoder": "encoder", "image_encoder": "encoder", "vae": "decoder"}
    dtypes = {
        name: config.dtype_of(stage_of.get(name, "transformer"), name)
        for name in ("text_encoder", "image_encoder", "vae", "transformer", "transformer_2")
    }
    if not any(stage.torch_device == "cuda" for stage in config.stages.values()):
        torch.set_num_threads(1)
        return load_stock_pipeline(folder, dtypes, "cpu"), "cpu"
    device = f"cuda:{index}"
    torch.cuda.set_device(index)
    if stock.max_vram_bytes is not None:
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, stock.max_vram_bytes / total), index)
    pipeline = load_stock_pipeline(folder, dtypes, "cpu" if stock.offload else device)
    if stock.is_tuned:
        _tune(pipeline, config)
    if config.stages["decoder"].vae.tile_pixels is not None:
        pipeline.vae.enable_tiling()
    if stock.offload == "model":
        pipeline.enable_model_cpu_offload(gpu_id=index)
    elif stock.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(gpu_id=index)
    elif stock.offload == "group":
        pipeline.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=True)
    return pipeline, device


def _tune(pipeline: Any, config: Config) -> None:
    denoiser, vae = config.stages["transformer"].denoiser, config.stages["decoder"].vae
    if denoiser.attention == "auto":
        denoiser = replace(denoiser, attention="flash_4")  # what auto finds fastest on Hopper
    tune_transformer("stock", "transformer", pipeline.transformer, denoiser, [], config.model.max_sequence_length)
    tune_vae(pipeline.vae, vae)


def _make(pipeline: Any, stock: Stock, index: int, cell: Cell, count: int) -> list[Video]:
    times, writing = [], []
    with ThreadPoolExecutor(1) as writer, tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            began = time.monotonic()
            frames = _call(pipeline, stock.config, cell, 1000 * index + number)
            times.append((began, time.monotonic()))
            writing.append(writer.submit(_write, frames, stock, Path(folder) / f"{number}.{stock.format}"))
            if number >= 2:
                writing[number - 2].result()  # no more than two videos wait in memory
        return [Video(*both, written.result()) for both, written in zip(times, writing, strict=True)]


def _call(pipeline: Any, config: Config, cell: Cell, seed: int) -> Frames:
    """Return the frames of a request, or the one that is an image."""
    defaults = config.defaults
    asked = {
        "prompt": PROMPT, "negative_prompt": defaults.negative_prompt, "height": defaults.height,
        "width": defaults.width, "num_inference_steps": cell.steps,
        "max_sequence_length": config.model.max_sequence_length, "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }  # fmt: skip
    if config.model.traits.makes == "image":
        made: Frames = pipeline(**asked, true_cfg_scale=cell.guidance).images
        return made
    frames: Frames = pipeline(**asked, num_frames=defaults.num_frames, guidance_scale=cell.guidance).frames[0]
    return frames


def _write(frames: Frames, stock: Stock, path: Path) -> float:
    content = frames if stock.format == "npy" else encode(frames, stock.config.defaults.fps, stock.format)
    write(content, stock.format, path, overwrite=True)
    path.unlink()
    return time.monotonic()

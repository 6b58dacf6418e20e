"""Gangs without Ray: processes that stay, on a core or a GPU each, and compute for one gang after the other.

To start a process and to import what it needs takes longer than what tests ask of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import make_image
from helpers import connect_stages, free_port

from disagg_ray.config.load import load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.schema import Config
from disagg_ray.graph import build_graph
from disagg_ray.media.video import to_array
from disagg_ray.models.parallel.ranks import Ranks
from disagg_ray.models.wan.shapes import get_shape
from disagg_ray.replica.stage import Stage
from disagg_ray.request import Request, ResolvedRequest, resolve

CONF = Path(__file__).parent.parent / "conf"
TIMEOUT_S = 400.0

Run = Callable[..., list[Any]]


@contextmanager
def gangs(device: str = "cpu") -> Iterator[Run]:
    """Give a function that returns what `work(ranks, *args)` returns in each rank's process, in their order.

    For a `ParallelConfig` of one rank, `ranks` is None.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    with ExitStack() as stack:

        @cache
        def start(rank: int) -> Any:
            """Start a process that sees one GPU only, from its first import on."""
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible[rank] if rank < len(visible) else "")
                return stack.enter_context(mp.get_context("spawn").Pool(1))

        def run(work: Callable[..., Any], parallel: ParallelConfig, *args: Any) -> list[Any]:
            address = f"127.0.0.1:{free_port()}"
            calls = [(work, rank, address, parallel, device, args) for rank in range(parallel.size)]
            jobs = [start(rank).apply_async(_join_and, call) for rank, call in enumerate(calls)]
            return [job.get(timeout=TIMEOUT_S) for job in jobs]

        yield run


def _join_and(
    work: Callable[..., Any], rank: int, address: str, parallel: ParallelConfig, device: str, args: Any
) -> Any:
    torch.set_num_threads(1)
    if not parallel.is_gang:
        return work(None, *args)
    ranks = Ranks.join(rank, address, parallel, device, TIMEOUT_S)
    try:
        return work(ranks, *args)
    finally:
        ranks.leave()


def load(task: str, folder: Path, *overrides: str) -> Config:
    return load_config(CONF / f"tiny_{task}.yaml", f"model.path={folder}", *overrides)


def asked(task: str, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a request that this model takes."""
    shape = get_shape(f"tiny-{task.replace('_', '-')}")
    arguments: dict[str, Any] = {
        "prompt": "a red circle", "negative_prompt": "blurry", "height": 32, "width": 48, "num_frames": 5,
        "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 7,
    }  # fmt: skip
    arguments |= {"image": make_image(60, 40)} if shape.takes_image else {}
    arguments |= {"last_image": make_image(40, 60, seed=1)} if shape.takes_last_image else {}
    arguments |= {"guidance_scale_2": 2.5} if shape.transformer_2 is not None else {}
    return arguments | changes


def generate(ranks: Ranks | None, config: Config, many: list[dict[str, Any]]) -> list[Any]:
    """Return the frames of each request; the transformer is that of a gang, if there is one."""
    stages = connect_stages(config)
    graph = build_graph([stage.ports for stage in stages.values()])
    for stage in stages.values():
        stage.load(ranks if "denoise" in stage.config.stages[stage.name].blocks else None)
    return [_run(stages, graph.order, *resolve(Request(**arguments, format="npy"), config)) for arguments in many]


def _run(stages: dict[str, Stage], order: Any, request: ResolvedRequest, images: dict[str, Any]) -> Any:
    tensors = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
    frames = None
    for name in order:
        inputs = {n: tensors[n] for n in stages[name].ports.inputs if n in tensors}
        made = stages[name].compute(request, inputs, None)
        tensors |= made.tensors
        frames = made.frames
    return np.asarray(frames)

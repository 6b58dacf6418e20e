"""Measures a stage whose replica is a gang: a process for each rank, on a GPU of its own, without Ray."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import psutil
import torch

from disagg_ray import environment
from disagg_ray.config.schema import Config
from disagg_ray.errors import PlanError
from disagg_ray.graph import Graph
from disagg_ray.models.parallel.ranks import Ranks
from disagg_ray.planning.measuring import Case, measure_stage
from disagg_ray.planning.parallel import spell
from disagg_ray.planning.profile import StageProfile
from disagg_ray.replica.gang import STALLS
from disagg_ray.replica.stage import Stage
from disagg_ray.text import printable
from disagg_ray.transfer.sockets import listen

logger = logging.getLogger("disagg_ray")

HOST = "127.0.0.1"
MEASURE_S = 3600.0
"""Until every rank must have measured everything."""


@dataclass(frozen=True)
class _Work:
    """What each rank does."""

    stage: str
    config: Config
    graph: Graph
    cases: tuple[Case, ...]
    repeats: int
    address: str
    """At which the ranks meet."""


def check_room(stage: str, config: Config) -> None:
    """Check that this machine has a GPU, or a core, for each rank of a stage's replica.

    Raises:
        PlanError: it has fewer.
    """
    settings = config.stages[stage]
    on_gpu = settings.torch_device == "cuda"
    have = torch.cuda.device_count() if on_gpu else psutil.cpu_count() or 1
    if have < settings.parallel.size:
        what = "GPUs" if on_gpu else "CPU cores"
        raise PlanError(
            f"profile: {spell(settings.parallel)} needs {settings.parallel.size} {what}, and this machine has {have}; "
            f"leave it out of --parallel and stages.{stage}.parallel: plan estimates it from one"
        )


def measure_gang(stage: str, config: Config, graph: Graph, cases: Sequence[Case], repeats: int) -> StageProfile:
    """Return what rank 0 measures of a stage while every rank of its replica computes the same cases.

    Raises:
        PlanError: a rank failed, died or hung.
    """
    settings = config.stages[stage]
    logger.info("profile: starting the ranks of %s, %s", stage, spell(settings.parallel))
    with listen(HOST, config.transport.ports) as free:
        address = f"{HOST}:{free.getsockname()[1]}"
    own = tuple(case.of_stage(stage, graph) for case in cases)
    work = _Work(stage, config, graph, own, repeats, address)
    context = multiprocessing.get_context("spawn")
    visible = environment.visible_gpus()
    answers: list[Connection] = []
    children = []
    for rank in range(settings.parallel.size):
        gpu = (visible[rank] if visible else str(rank)) if settings.torch_device == "cuda" else None
        ours, theirs = context.Pipe(duplex=False)
        answers.append(ours)
        children.append(context.Process(target=_serve, args=(theirs, rank, gpu, work), daemon=True))
        children[-1].start()
        theirs.close()  # so that the end of a process ends its pipe
    try:
        return _collect(work, answers)
    finally:
        for child in children:
            child.kill()
            child.join()


def _collect(work: _Work, answers: list[Connection]) -> StageProfile:
    """Wait until every rank has answered; return rank 0's answer."""
    deadline, waiting = time.monotonic() + MEASURE_S, dict(enumerate(answers))
    measured: dict[int, StageProfile] = {}
    key = f"profile: {work.stage}, {spell(work.config.stages[work.stage].parallel)}"
    while waiting:
        ready = wait(waiting.values(), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise PlanError(f"{key}: rank {min(waiting)} has not answered for {MEASURE_S:g} s")
        for rank, answer in [(rank, answer) for rank, answer in waiting.items() if answer in ready]:
            try:
                found = answer.recv()
            except EOFError:
                found = "its process died"
            if isinstance(found, str):
                raise PlanError(f"{key}: rank {rank} failed: {found}")
            measured[rank] = found
            del waiting[rank]
    return measured[0]


def _serve(answer: Connection, rank: int, gpu: str | None, work: _Work) -> None:
    """Measure as one rank, and answer with the profile or why there is none; the process's only work."""
    if gpu is not None:
        environment.replace("CUDA_VISIBLE_DEVICES", gpu)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer.send(_measure(rank, work))
    except Exception as error:  # noqa: BLE001 - the process's boundary: the parent reports it
        answer.send(f"{type(error).__name__}: {printable(str(error))}")


def _measure(rank: int, work: _Work) -> StageProfile:
    stage = Stage(work.stage, work.config)
    settings, timeout_s = work.config.stages[work.stage], STALLS * work.config.failures.stall_s
    ranks = Ranks.join(rank, work.address, settings.parallel, stage.device, timeout_s)
    profile = measure_stage(stage, work.graph, work.cases, work.repeats, ranks)
    ranks.leave()
    return profile


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was spawned"
    parent.join()
    os._exit(1)

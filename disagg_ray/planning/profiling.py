"""Measures a model's stages on this machine, one after the other, each alone in memory."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from disagg_ray.config.schema import Config, TransportConfig
from disagg_ray.errors import PlanError
from disagg_ray.graph import Graph, build_graph
from disagg_ray.media.video import encode
from disagg_ray.planning.layouts import CPU
from disagg_ray.planning.profile import VERSION, Load, Point, Profile, StageProfile, installed_versions
from disagg_ray.replica.stage import RAW, Stage
from disagg_ray.request import IMAGES_OF, Request, ResolvedRequest, resolve
from disagg_ray.transfer.handoff import AttemptKey
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import slot_bytes

logger = logging.getLogger("disagg_ray")

HOST = "127.0.0.1"
NUM_PULLS = 5
MIN_HANDOFF_BYTES = 4 * 2**20
"""Least size of the tensor whose handoff is timed."""


@dataclass(frozen=True)
class _Case:
    """One request, with the tensors that the stages so far made, in host memory."""

    request: ResolvedRequest
    tensors: dict[str, torch.Tensor]

    @property
    def load(self) -> Load:
        request = self.request
        passes = request.num_inference_steps * (2 if request.guided else 1)
        return Load(request.height, request.width, request.num_frames, passes)


def measure_profile(config: Config, requests: Sequence[Request], repeats: int = 2) -> Profile:
    """Measure every stage with every request, `repeats` times after a first time that is not measured.

    Raises:
        PlanError: the configuration is fused, has groups, ranks or a tiled decode, or is not text-to-video.
    """
    if config.fused or any(stage.groups for stage in config.stages.values()):
        raise PlanError("profile: fused stages and groups cannot be measured; leave fused and groups out")
    if any(stage.parallel.is_gang for stage in config.stages.values()):
        raise PlanError("profile: a replica of several ranks cannot be measured yet; leave parallel out")
    if config.num_parts:
        raise PlanError("profile: a tiled decode cannot be measured; write decode in place of its parts")
    if IMAGES_OF[config.model.task]:
        raise PlanError(f"profile: model.task {config.model.task!r} needs images; only t2v and ti2v can be measured")
    cases = [_Case(resolve(request, config)[0], {}) for request in requests]
    on_gpu = any(stage.torch_device == "cuda" for stage in config.stages.values())
    shares = {  # so that stages take turns, which are measured
        name: replace(stage, num_gpus=0.5) if stage.torch_device == "cuda" else stage
        for name, stage in config.stages.items()
    }
    sharing = replace(config, gpu_turns=True, stages=shares)
    stages = {name: Stage(name, sharing) for name in config.stages}
    graph = build_graph([stage.ports for stage in stages.values()])
    profiles = tuple(_measure_stage(stages.pop(name), graph, cases, repeats) for name in graph.order)
    largest = max((p.handoff_bytes for stage in profiles for p in stage.points), default=0)
    rate = _handoff_rate(largest, "cuda" if on_gpu else "cpu")
    format = cases[0].request.format
    measured = config.speed, installed_versions(), config.model.path
    return Profile(VERSION, *_describe_device(on_gpu=on_gpu), *measured, format, rate, profiles)


def _describe_device(*, on_gpu: bool) -> tuple[str, str, int]:
    """Return Ray's name of the GPU (or CPU), its full name, and its bytes of memory (of a CPU: per core)."""
    if not on_gpu:
        memory = psutil.virtual_memory().total // (psutil.cpu_count() or 1)
        return CPU, f"{psutil.cpu_count()} cores", memory
    properties = torch.cuda.get_device_properties(0)
    words = properties.name.removeprefix("NVIDIA ").split()
    kind = next((word for word in words if any(c.isdigit() for c in word)), words[0])
    return kind, properties.name, properties.total_memory


def _measure_stage(stage: Stage, graph: Graph, cases: Sequence[_Case], repeats: int) -> StageProfile:
    stage.connect(graph)
    began = time.perf_counter()
    stage.load()
    load_s = time.perf_counter() - began
    logger.info("profile: %s loaded in %.1f s", stage.name, load_s)
    points = []
    for case in cases:
        torch.cuda.empty_cache()  # of larger cases before
        outputs = stage.compute(case.request, case.tensors, None)  # not measured: chooses kernels, and allocates
        points += [_measure_point(stage, case) for _ in range(repeats)]
        case.tensors.update({name: tensor.cpu() for name, tensor in outputs.tensors.items()})
        logger.info("profile: %s computed %s in %.3f s", stage.name, case.load, points[-1].compute_s)
    needs = stage.needs()
    profile = StageProfile(
        stage.name, "denoise" in stage.config.stages[stage.name].blocks, load_s, sum(stage.weights.values()),
        needs.input_bytes, needs.output_bytes, stage.cache_bytes, tuple(points),
    )  # fmt: skip
    del stage
    gc.collect()
    torch.cuda.empty_cache()
    return profile


def _measure_point(stage: Stage, case: _Case) -> Point:
    before = stage.allocated_bytes
    if before:
        torch.cuda.reset_peak_memory_stats()
    turns_before, began = stage.turns_s, time.perf_counter()
    outputs = stage.compute(case.request, case.tensors, None)
    computed, turns_after = time.perf_counter(), stage.turns_s
    turn_s = computed - began if turns_before is None or turns_after is None else turns_after - turns_before
    if outputs.frames is not None and case.request.format not in RAW:
        encode(outputs.frames, case.request.fps, case.request.format, stage.config.output.scale)
    finished = time.perf_counter()
    handoff = sum(tensor.nbytes for tensor in outputs.tensors.values())
    work = max(0, stage.peak_bytes - before)
    return Point(case.load, computed - began, turn_s, finished - computed, work, handoff)


def _handoff_rate(nbytes: int, device: str) -> float:
    """Return the bytes per second of publish and pull between two pools over loopback TCP."""
    tensors = {"latents": torch.zeros(max(nbytes, MIN_HANDOFF_BYTES), dtype=torch.uint8, device=device)}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    capacity, transport = slot_bytes(sizes["latents"]), TransportConfig("tcp")
    source, target = (Pool(f"profile-{end}", capacity, HOST, transport, device) for end in ("from", "to"))
    seconds = []
    try:
        for number in range(NUM_PULLS + 1):
            key = AttemptKey("profile", number)
            source.reserve(key, sizes)
            target.reserve(key, sizes)
            began = time.perf_counter()
            target.pull(key, source.publish(key, tensors))
            seconds.append(time.perf_counter() - began)
            source.release(key)
            target.release(key)
    finally:
        source.close()
        target.close()
    return sizes["latents"] / statistics.median(seconds[1:])  # the first pull opens the connection

"""Measures a model's stages on this machine, one after the other, each alone in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.schema import Config
from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import PlanError
from disagg_ray.graph import build_graph
from disagg_ray.media.video import to_array
from disagg_ray.planning.layouts import CPU
from disagg_ray.planning.measuring import Case, measure_stage
from disagg_ray.planning.parallel import spell
from disagg_ray.planning.profile import VERSION, Profile, installed_versions
from disagg_ray.planning.ranks import check_room, measure_gang
from disagg_ray.replica.stage import Stage
from disagg_ray.request import Request, resolve
from disagg_ray.transfer.handoff import AttemptKey
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import slot_bytes

HOST = "127.0.0.1"
NUM_PULLS = 5
MIN_HANDOFF_BYTES = 4 * 2**20
"""Least size of the tensor whose handoff is timed."""


def measure_profile(
    config: Config, requests: Sequence[Request], repeats: int = 2, gangs: Sequence[ParallelConfig] = ()
) -> Profile:
    """Measure every stage with every request, `repeats` times after a first time that is not measured.

    The denoising stage is also measured with the ranks of each of `gangs`, and the decoder with those of `rows`.

    Raises:
        PlanError: the configuration is fused, has groups or a tiled decode; this machine has too few GPUs for a gang.
    """
    _check(config)
    split = [_with_ranks(config, parallel, requests) for parallel in gangs]
    cases = [_case(request, config) for request in requests]
    on_gpu = any(stage.torch_device == "cuda" for stage in config.stages.values())
    shares = {  # so that stages take turns, which are measured
        name: replace(stage, num_gpus=0.5 if stage.torch_device == "cuda" else 0, parallel=ParallelConfig())
        for name, stage in config.stages.items()
    }
    sharing = replace(config, gpu_turns=True, stages=shares)
    stages = {name: Stage(name, sharing) for name in config.stages}
    graph = build_graph([stage.ports for stage in stages.values()])
    profiles = tuple(measure_stage(stages.pop(name), graph, cases, repeats) for name in graph.order)
    ganged = tuple(measure_gang(name, asked, graph, cases, repeats) for name, asked in split)
    largest = max((p.handoff_bytes for stage in profiles for p in stage.points), default=0)
    rate = _handoff_rate(largest, "cuda" if on_gpu else "cpu")
    format = cases[0].request.format
    measured = config.speed, installed_versions(), config.model.path
    return Profile(VERSION, *_describe_device(on_gpu=on_gpu), *measured, format, rate, profiles, ganged)


def _check(config: Config) -> None:
    if config.fused or any(stage.groups for stage in config.stages.values()):
        raise PlanError("profile: fused stages and groups cannot be measured; leave fused and groups out")
    if config.num_parts:
        raise PlanError("profile: a tiled decode cannot be measured; write decode in place of its parts")


def _case(request: Request, config: Config) -> Case:
    resolved, images = resolve(request, config)
    return Case(resolved, {name: torch.from_numpy(to_array(image)) for name, image in images.items()})


def _with_ranks(config: Config, parallel: ParallelConfig, requests: Sequence[Request]) -> tuple[str, Config]:
    """Return the stage that such ranks share, and a configuration in which its replicas are gangs.

    Raises:
        InputError: the configuration, a request or this machine does not go with them.
    """
    block = "decode" if parallel.rows > 1 else "denoise"
    name = next(name for name, stage in config.stages.items() if block in stage.blocks)
    stage = config.stages[name]
    asked = replace(stage, parallel=parallel, num_gpus=1.0 if stage.torch_device == "cuda" else 0.0)
    split = replace(config, share_gpu=[], stages=config.stages | {name: asked})
    check_room(name, split)
    for request in requests:
        resolved, _ = resolve(request, split)
        if parallel.cfg > 1 and not resolved.guided:
            raise PlanError(
                f"profile: {spell(parallel)} needs guidance: without it half of the ranks idle; raise "
                f"defaults.guidance_scale over 1, or leave cfg out of --parallel and stages.{name}.parallel"
            )
    return name, split


def _describe_device(*, on_gpu: bool) -> tuple[str, str, int]:
    """Return Ray's name of the GPU (or CPU), its full name, and its bytes of memory (of a CPU: per core)."""
    if not on_gpu:
        memory = psutil.virtual_memory().total // (psutil.cpu_count() or 1)
        return CPU, f"{psutil.cpu_count()} cores", memory
    properties = torch.cuda.get_device_properties(0)
    words = properties.name.removeprefix("NVIDIA ").split()
    kind = next((word for word in words if any(c.isdigit() for c in word)), words[0])
    return kind, properties.name, properties.total_memory


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

"""Which values the configuration's keys may have, alone and beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING

from disagg_ray.options import OFFLOADS, SCHEDULERS, Check, denoiser_checks, part_checks, size_checks

if TYPE_CHECKING:
    from disagg_ray.config import (
        Config,
        DefaultsConfig,
        FailuresConfig,
        LimitsConfig,
        StageConfig,
        StandingConfig,
    )

MULTIPLE = 16
"""Height and width are multiples of the VAE's factor 8 times the transformer's patch of 2."""
TASKS = ("t2v", "i2v", "flf2v")
PROTOCOLS = ("auto", "nvlink_intra", "rdma", "tcp")
DTYPES = ("float32", "bfloat16", "float16")


def config_checks(config: Config) -> Iterator[Check]:
    """Yield (key, value, whether it is possible, remedy)."""
    model, defaults, limits, transport = config.model, config.defaults, config.limits, config.transport
    yield "model.task", model.task, model.task in TASKS, f"write one of {', '.join(TASKS)}"
    yield "model.max_sequence_length", model.max_sequence_length, model.max_sequence_length >= 1, "write 1 or more"
    shift = model.flow_shift
    yield "model.flow_shift", shift, shift is None or (math.isfinite(shift) and shift > 0), "write a positive number"
    ratio = model.boundary_ratio
    yield "model.boundary_ratio", ratio, ratio is None or 0 <= ratio <= 1, "write a number from 0 to 1"
    scheduler, sigmas = model.scheduler, model.sigmas
    yield "model.scheduler", scheduler, scheduler in (None, *SCHEDULERS), f"write {' or '.join(SCHEDULERS)}, or null"
    falling = all(1 >= sigma > after >= 0 for sigma, after in pairwise([*sigmas, 0.0]))
    yield "model.sigmas", sigmas, falling, "write numbers that fall from at most 1 to above 0"
    yield "model.sigmas", sigmas, len(sigmas) <= limits.max_steps, f"limits.max_steps is {limits.max_steps}"
    for f in fields(model.dtype):
        dtype = getattr(model.dtype, f.name)
        yield f"model.dtype.{f.name}", dtype, dtype in DTYPES, f"write one of {', '.join(DTYPES)}"
    for f in fields(limits):
        yield f"limits.{f.name}", getattr(limits, f.name), getattr(limits, f.name) >= 1, "write 1 or more"
    yield from _default_checks(defaults, limits)
    yield from _stage_checks(config.stages, limits)
    yield from _sharing_checks(config)
    yield from _failure_checks(config.failures)
    yield from _standing_checks(config.standing)
    yield "transport.protocol", transport.protocol, transport.protocol in PROTOCOLS, f"write {' or '.join(PROTOCOLS)}"
    yield "transport.timeout_s", transport.timeout_s, 5 <= transport.timeout_s < math.inf, "write 5 or more"
    ports = transport.port_range
    yield "transport.port_range", ports, ports is None or _is_port_range(ports), "write FIRST-LAST, as 15000-15999"
    for key in ("pool_bytes", "driver_pool_bytes"):
        value = getattr(transport, key)
        ok = value == "auto" or (isinstance(value, int) and value > 0)
        yield f"transport.{key}", value, ok, "write auto or a number of bytes"
    yield "output.scale", config.output.scale, 1 <= config.output.scale <= 16, "write 1 to 16"
    start, gpus = config.cluster.start_timeout_s, config.cluster.num_gpus
    yield "cluster.start_timeout_s", start, 0 < start < math.inf, "write a positive number of seconds"
    yield "cluster.num_gpus", gpus, gpus is None or gpus >= 0, "write 0 or more, or null"


def _default_checks(defaults: DefaultsConfig, limits: LimitsConfig) -> Iterator[Check]:
    for name in ("height", "width"):
        pixels = getattr(defaults, name)
        yield f"defaults.{name}", pixels, pixels > 0 and pixels % MULTIPLE == 0, f"write a multiple of {MULTIPLE}"
    size = defaults.height * defaults.width
    yield "defaults.height x width", size, size <= limits.max_pixels, f"limits.max_pixels is {limits.max_pixels}"
    frames = defaults.num_frames
    yield "defaults.num_frames", frames, frames > 0 and frames % 4 == 1, "write 4k + 1, as 81"
    yield "defaults.num_frames", frames, frames <= limits.max_frames, f"limits.max_frames is {limits.max_frames}"
    steps = defaults.num_inference_steps
    yield "defaults.num_inference_steps", steps, 1 <= steps <= limits.max_steps, f"write 1 to {limits.max_steps}"
    for name in ("guidance_scale", "guidance_scale_2"):
        scale = getattr(defaults, name)
        yield f"defaults.{name}", scale, scale is None or 0 <= scale < math.inf, "write a finite number of 0 or more"
    yield "defaults.fps", defaults.fps, 1 <= defaults.fps <= 240, "write 1 to 240"


def _stage_checks(stages: Mapping[str, StageConfig], limits: LimitsConfig) -> Iterator[Check]:
    yield "stages", sorted(stages), bool(stages), "name at least one stage"
    yield from part_checks([(f"stages.{name}", stage.blocks, stage.vae) for name, stage in stages.items()])
    for name, stage in stages.items():
        key = f"stages.{name}"
        yield key, name, name.isidentifier() and name.islower(), "name it in lower-case letters, digits and _"
        yield f"{key}.blocks", stage.blocks, bool(stage.blocks), "name at least one block"
        for group, settings in stage.replica_groups.items():
            yield from _resource_checks(f"{key}.groups.{group}" if group else key, settings)
        threads = stage.num_threads
        yield f"{key}.num_threads", threads, threads is None or threads >= 1, "write 1 or more, or null"
        yield f"{key}.dtype", stage.dtype, stage.dtype in (None, *DTYPES), f"write one of {', '.join(DTYPES)}"
        most = stage.gpu_bytes
        yield f"{key}.gpu_bytes", most, most is None or most > 0, "write a number of bytes, or null"
        yield f"{key}.cache_bytes", stage.cache_bytes, stage.cache_bytes >= 0, "write 0 or more"
        yield f"{key}.device", stage.device, stage.device in ("auto", "cpu", "cuda"), "write auto, cpu or cuda"
        yield f"{key}.placement", stage.placement, stage.placement in ("pack", "spread"), "write pack or spread"
        yield f"{key}.offload", stage.offload, stage.offload in OFFLOADS, f"write one of {', '.join(OFFLOADS)}"
        yield from denoiser_checks(f"{key}.denoiser", stage.denoiser, stage.offload, stage.warm_up)
        tile = stage.vae.tile_pixels
        yield f"{key}.vae.tile_pixels", tile, tile is None or tile >= 0, "write 0 or more, or null"
        yield from size_checks(f"{key}.warm_up", stage.warm_up, MULTIPLE, limits.max_pixels, limits.max_frames)


def _resource_checks(key: str, stage: StageConfig) -> Iterator[Check]:
    yield f"{key}.replicas", stage.replicas, stage.replicas >= 1, "write 1 or more"
    least, most, now = stage.min_replicas, stage.max_replicas, stage.replicas
    bounds = {"min": least, "max": most}
    fixed = least is None and most is None
    ok = fixed or (least is not None and most is not None and 1 <= least <= now <= most)
    yield f"{key}.replicas", bounds, ok, "write both, with 1 <= min <= max"
    yield f"{key}.replicas", bounds, fixed or not stage.groups, "groups of replicas cannot be scaled"
    ok = 0 <= stage.num_gpus <= 1 or (stage.num_gpus > 1 and stage.num_gpus.is_integer())
    yield f"{key}.num_gpus", stage.num_gpus, ok, "write a fraction or a whole number"
    yield f"{key}.num_cpus", stage.num_cpus, 0 <= stage.num_cpus < math.inf, "write 0 or more"
    yield f"{key}.memory", stage.memory, stage.memory is None or stage.memory > 0, "write a number of bytes, or null"
    for name, number in stage.resources.items():
        own = name not in ("CPU", "GPU", "memory", "object_store_memory")
        yield f"{key}.resources", name, own, "write num_cpus, num_gpus or memory"
        ok = 0 < number <= 1 or (number > 1 and float(number).is_integer())
        yield f"{key}.resources.{name}", number, ok, "write a fraction or a whole number"
    kind = stage.accelerator_type
    yield f"{key}.accelerator_type", kind, kind is None or stage.num_gpus > 0, "give the stage num_gpus, or write null"


def _sharing_checks(config: Config) -> Iterator[Check]:
    if config.fused:  # nothing is left to share with
        return
    names = config.share_gpu
    yield "share_gpu", names, len(set(names)) == len(names) != 1, "name two stages or more, each once"
    yield "share_gpu", names, set(names) <= set(config.stages), f"the stages are {', '.join(config.stages)}"
    sharing = [config.stages[name] for name in names if name in config.stages]
    yield "share_gpu", names, not any(s.groups for s in sharing), "a stage with groups cannot share"
    yield "share_gpu", names, len({s.replicas for s in sharing}) <= 1, "give these stages the same number of replicas"
    fixed = all(s.max_replicas is None for s in sharing)
    yield "share_gpu", names, fixed, "their replicas cannot be {min, max}; write a number"
    gpus = sum(s.num_gpus for s in sharing)
    yield "share_gpu", names, gpus <= 1, f"their num_gpus add up to {gpus:g}; let them add up to 1 at most, or write []"


def _failure_checks(failures: FailuresConfig) -> Iterator[Check]:
    yield "failures.max_attempts", failures.max_attempts, failures.max_attempts >= 1, "write 1 or more"
    stall, limit, grace = failures.stall_s, failures.timeout_s, failures.shutdown_grace_s
    yield "failures.stall_s", stall, 1 <= stall < math.inf, "write 1 second or more"
    yield "failures.answer_s", failures.answer_s, 1 <= failures.answer_s < math.inf, "write 1 second or more"
    yield "failures.timeout_s", limit, limit is None or 0 < limit < math.inf, "write a positive number, or null"
    yield "failures.shutdown_grace_s", grace, 0 <= grace < math.inf, "write 0 or more"


def _standing_checks(standing: StandingConfig) -> Iterator[Check]:
    for f in fields(standing):
        value = getattr(standing, f.name)
        if not isinstance(value, bool):
            yield f"standing.{f.name}", value, 0 < value < math.inf, "write a positive number"


def _is_port_range(text: str) -> bool:
    first, dash, last = text.partition("-")
    return bool(dash) and first.isdigit() and last.isdigit() and 1024 <= int(first) <= int(last) <= 65535

"""Which values the configuration's keys may have, alone and beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from disagg_ray.config.options import (
    BLEND,
    CACHES,
    MODES,
    OFFLOADS,
    QUANTIZATIONS,
    SCHEDULERS,
    TEXT_ENCODER,
    TRANSFORMERS,
    Check,
    DenoiserConfig,
    StepCacheConfig,
    VaeConfig,
    name_parts,
    one_of,
    parse_part,
)
from disagg_ray.text import MASK, did_you_mean, mask, nearest, printable

if TYPE_CHECKING:
    from disagg_ray.config.schema import (
        ClusterConfig,
        Config,
        DefaultsConfig,
        FailuresConfig,
        LimitsConfig,
        ModelConfig,
        ServiceConfig,
        StageConfig,
        TransportConfig,
    )


def part_checks(stages: Sequence[tuple[str, Sequence[str], VaeConfig]]) -> Iterator[Check]:
    """Yield what is wrong with a decode in parts; a stage is given by its key, its blocks and its VAE's options."""
    found = sorted(block for _, blocks, _ in stages for block in blocks if block.split(".")[0] in ("decode", BLEND))
    if set(found) <= {"decode"}:
        return  # how many there must be is the graph's affair
    num_parts = max([2, *(part[1] for block in found if (part := parse_part(block)))])
    parts = name_parts(num_parts)
    remedy = f"must be decode alone, or {', '.join(parts)} and {BLEND}, each once"
    yield "stages", found, found == sorted([*parts, BLEND]), remedy
    for key, blocks, vae in stages:
        own = len(set(parts) & set(blocks))
        apart = BLEND not in blocks or own in (0, num_parts)
        yield f"{key}.blocks", blocks, apart, f"{BLEND} waits for all parts and must have a stage of its own"
        ok = vae.tile_pixels is None or not own or "vae_encoder" in blocks
        yield f"{key}.vae.tile_pixels", vae.tile_pixels, ok, "must be left out: a decode in parts always works in tiles"


def denoiser_checks(key: str, denoiser: DenoiserConfig, offload: str, warm_up: list[list[int]]) -> Iterator[Check]:
    """Yield what is wrong with a transformer's options, and which of them exclude each other."""
    attention, mode, cache = denoiser.attention, denoiser.compile, denoiser.step_cache
    named = attention != "auto" or bool(warm_up)
    yield f"{key}.attention", attention, named, "is measured at the sizes of the stage's warm_up; name one there"
    yield one_of(f"{key}.compile", mode, MODES, null=True)
    quantization = denoiser.quantization
    yield one_of(f"{key}.quantization", quantization, QUANTIZATIONS)
    ok = quantization != "fp8" or (offload == "none" and not denoiser.loras)
    yield f"{key}.quantization", quantization, ok, "goes with neither offload nor loras; write fp8_storage"
    ok = quantization != "fp8_storage" or mode is None
    yield f"{key}.quantization", quantization, ok, "cannot be compiled; write compile: null, or fp8"
    yield from _cache_checks(f"{key}.step_cache", cache)
    for number, lora in enumerate(denoiser.loras):
        place = f"{key}.loras[{number}]"
        yield f"{place}.path", lora.path, lora.path.endswith(".safetensors"), "must be a .safetensors file"
        yield f"{place}.strength", lora.strength, math.isfinite(lora.strength), "must be a finite number"
        yield one_of(f"{place}.transformer", lora.transformer, TRANSFORMERS)


def _cache_checks(key: str, cache: StepCacheConfig) -> Iterator[Check]:
    method, threshold, interval = cache.method, cache.threshold, cache.interval
    yield one_of(f"{key}.method", method, CACHES)
    ok = threshold is None or (method in ("first_block", "mag", "sea") and 0 <= threshold < math.inf)
    yield f"{key}.threshold", threshold, ok, "must be at least 0, and only for first_block, mag or sea"
    ok = interval is None or (method == "taylorseer" and interval >= 1)
    yield f"{key}.interval", interval, ok, "must be at least 1, and only for taylorseer"
    ok = bool(cache.ratios) == (method == "mag") and all(0 < ratio < math.inf for ratio in cache.ratios)
    yield f"{key}.ratios", cache.ratios, ok, "must be the model's positive ratios for mag, and [] for any other method"


def size_checks(key: str, warm_up: list[list[int]], multiple: int, max_pixels: int, max_frames: int) -> Iterator[Check]:
    """Yield which sizes of a stage's warm-up no request could have."""
    for size in warm_up:
        ok = len(size) == 3 and all(number > 0 for number in size)
        yield key, size, ok, "must be [height, width, num_frames]"
        height, width, num_frames = size
        ok = height % multiple == width % multiple == 0 and height * width <= max_pixels
        yield key, size, ok, f"must be multiples of {multiple} within limits.max_pixels"
        yield key, size, num_frames % 4 == 1 and num_frames <= max_frames, "must be 4k + 1 within limits.max_frames"


MULTIPLE = 16
"""Height and width are multiples of the VAE's factor 8 times the transformer's patch of 2."""

TASKS = ("t2v", "i2v", "flf2v")

PROTOCOLS = ("auto", "nvlink_intra", "rdma", "tcp")

ADMITTED = ("auto", "host", "any")

DTYPES = ("float32", "bfloat16", "float16")

DEVICES = ("auto", "cpu", "cuda")

PLACEMENTS = ("pack", "spread")


def config_checks(config: Config) -> Iterator[Check]:
    """Yield (key, value, whether it may be so, what it must be)."""
    yield from _model_checks(config.model, config.limits)
    for f in fields(config.limits):
        yield f"limits.{f.name}", getattr(config.limits, f.name), getattr(config.limits, f.name) >= 1, at_least(1)
    yield from _default_checks(config.defaults, config.limits)
    yield from _stage_checks(config.stages, config.limits)
    yield from _sharing_checks(config)
    yield from _failure_checks(config.failures)
    yield from _service_checks(config.service)
    yield from _transport_checks(config.transport)
    yield "output.scale", config.output.scale, 1 <= config.output.scale <= 16, "must be from 1 to 16"
    yield from _cluster_checks(config.cluster)


def at_least(least: int) -> str:
    return f"must be at least {least}"


def _model_checks(model: ModelConfig, limits: LimitsConfig) -> Iterator[Check]:
    yield one_of("model.task", model.task, TASKS)
    yield "model.max_sequence_length", model.max_sequence_length, model.max_sequence_length >= 1, at_least(1)
    shift = model.flow_shift
    ok = shift is None or (math.isfinite(shift) and shift > 0)
    yield "model.flow_shift", shift, ok, "must be a positive number or null"
    ratio = model.boundary_ratio
    yield "model.boundary_ratio", ratio, ratio is None or 0 <= ratio <= 1, "must be from 0 to 1, or null"
    yield one_of("model.scheduler", model.scheduler, SCHEDULERS, null=True)
    sigmas = model.sigmas
    falling = all(1 >= sigma > after >= 0 for sigma, after in pairwise([*sigmas, 0.0]))
    yield "model.sigmas", sigmas, falling, "must fall from at most 1 to above 0"
    yield (
        "model.sigmas",
        sigmas,
        len(sigmas) <= limits.max_steps,
        f"must be at most limits.max_steps={limits.max_steps}",
    )
    for f in fields(model.dtype):
        yield one_of(f"model.dtype.{f.name}", getattr(model.dtype, f.name), DTYPES)


def _default_checks(defaults: DefaultsConfig, limits: LimitsConfig) -> Iterator[Check]:
    for name in ("height", "width"):
        pixels = getattr(defaults, name)
        ok = pixels > 0 and pixels % MULTIPLE == 0
        yield f"defaults.{name}", pixels, ok, f"must be a positive multiple of {MULTIPLE}"
    size, most = defaults.height * defaults.width, limits.max_pixels
    yield "defaults.height x width", size, size <= most, f"must be at most limits.max_pixels={most}"
    frames, most = defaults.num_frames, limits.max_frames
    yield "defaults.num_frames", frames, frames > 0 and frames % 4 == 1, "must be 4k + 1, as 81"
    yield "defaults.num_frames", frames, frames <= most, f"must be at most limits.max_frames={most}"
    steps, most = defaults.num_inference_steps, limits.max_steps
    yield "defaults.num_inference_steps", steps, 1 <= steps <= most, f"must be from 1 to limits.max_steps={most}"
    for name in ("guidance_scale", "guidance_scale_2"):
        scale = getattr(defaults, name)
        ok = scale is None or 0 <= scale < math.inf
        yield f"defaults.{name}", scale, ok, "must be a finite number of at least 0"
    yield "defaults.fps", defaults.fps, 1 <= defaults.fps <= 240, "must be from 1 to 240"


def _stage_checks(stages: Mapping[str, StageConfig], limits: LimitsConfig) -> Iterator[Check]:
    yield "stages", sorted(stages), bool(stages), "must be at least one stage"
    for name, stage in stages.items():
        key = f"stages.{name}"
        ok = name.isascii() and name.isidentifier() and name.islower()
        yield f"{key}", name, ok, "must be a name of lower-case letters, digits and _"
        near = nearest(name, stages.keys() - {name})
        hint = f"; did you mean the stage {printable(near)}?" if near is not None else ""
        yield f"{key}.blocks", stage.blocks, bool(stage.blocks), f"must name at least one block{hint}"
    yield from part_checks([(f"stages.{name}", stage.blocks, stage.vae) for name, stage in stages.items()])
    for name, stage in stages.items():
        key = f"stages.{name}"
        for group, settings in stage.replica_groups.items():
            yield from _resource_checks(f"{key}.groups.{group}" if group else key, settings)
        yield from _running_checks(key, stage)
        yield from denoiser_checks(f"{key}.denoiser", stage.denoiser, stage.offload, stage.warm_up)
        yield from size_checks(f"{key}.warm_up", stage.warm_up, MULTIPLE, limits.max_pixels, limits.max_frames)


def _running_checks(key: str, stage: StageConfig) -> Iterator[Check]:
    threads, most, cache, tile = stage.num_threads, stage.max_vram_bytes, stage.cache_bytes, stage.vae.tile_pixels
    yield f"{key}.num_threads", threads, threads is None or threads >= 1, "must be at least 1, or null"
    yield one_of(f"{key}.dtype", stage.dtype, DTYPES, null=True)
    yield one_of(f"{key}.device", stage.device, DEVICES)
    yield one_of(f"{key}.placement", stage.placement, PLACEMENTS)
    yield one_of(f"{key}.offload", stage.offload, OFFLOADS)
    yield f"{key}.max_vram_bytes", most, most is None or most > 0, "must be a number of bytes, or null"
    on_gpu = any(group.torch_device == "cuda" for group in stage.replica_groups.values())
    remedy = "must be null: the stage runs on the CPU; give it num_gpus, or leave this out"
    yield f"{key}.max_vram_bytes", most, most is None or on_gpu, remedy
    remedy = "must be none: the stage runs on the CPU, where its weights are; give it num_gpus, or leave this out"
    yield f"{key}.offload", stage.offload, stage.offload == "none" or on_gpu, remedy
    tunes = stage.vae.autotune
    remedy = "must be false: the stage runs on the CPU, where cuDNN does not"
    yield f"{key}.vae.autotune", tunes, on_gpu or not tunes, remedy
    yield f"{key}.cache_bytes", cache, cache >= 0, at_least(0)
    ok = cache in (0, type(stage).cache_bytes) or TEXT_ENCODER in stage.blocks
    yield f"{key}.cache_bytes", cache, ok, f"must be left out: it is for the stage with the block {TEXT_ENCODER}"
    yield f"{key}.vae.tile_pixels", tile, tile is None or tile >= 0, "must be at least 0, or null"


def _resource_checks(key: str, stage: StageConfig) -> Iterator[Check]:
    yield f"{key}.replicas", stage.replicas, stage.replicas >= 1, at_least(1)
    least, most, now = stage.min_replicas, stage.max_replicas, stage.replicas
    fixed = least is None and most is None
    bounds = now if fixed else {"min": least, "max": most}
    ok = fixed or (least is not None and most is not None and 1 <= least <= now <= most)
    yield f"{key}.replicas", bounds, ok, "must be both, with 1 <= min <= max"
    yield f"{key}.replicas", bounds, fixed or not stage.groups, "must be a number: groups of replicas cannot be scaled"
    remedy = "must be from 0 to 1: a replica computes on one GPU"
    more = f"; write replicas={stage.num_gpus:g} for that many" if 1 < stage.num_gpus < math.inf else ""
    yield f"{key}.num_gpus", stage.num_gpus, 0 <= stage.num_gpus <= 1, remedy + more
    yield f"{key}.num_cpus", stage.num_cpus, 0 <= stage.num_cpus < math.inf, at_least(0)
    memory = stage.memory
    yield f"{key}.memory", memory, memory is None or memory > 0, "must be a number of bytes, or null"
    for name, number in stage.resources.items():
        own = name not in ("CPU", "GPU", "memory", "object_store_memory")
        yield f"{key}.resources", name, own, "must be a custom resource; write num_cpus, num_gpus or memory"
        ok = 0 < number <= 1 or (number > 1 and float(number).is_integer())
        yield f"{key}.resources.{name}", number, ok, "must be a fraction or a whole number"
    kind = stage.accelerator_type
    ok = kind is None or stage.num_gpus > 0
    yield f"{key}.accelerator_type", kind, ok, "must be null, or give the stage num_gpus"


def _sharing_checks(config: Config) -> Iterator[Check]:
    if config.fused:  # nothing is left to share with
        return
    names = config.share_gpu
    yield "share_gpu", names, len(set(names)) == len(names) != 1, "must name two stages or more, each once"
    unknown = next((name for name in names if name not in config.stages), None)
    remedy = f"must be of the stages {', '.join(config.stages)}{did_you_mean(unknown or '', config.stages)}"
    yield "share_gpu", names, unknown is None, remedy
    sharing = {name: config.stages[name] for name in names}
    for name, stage in sharing.items():
        yield "share_gpu", names, not stage.groups, f"must leave {name} out: a stage with groups cannot share"
        fixed = stage.max_replicas is None
        yield "share_gpu", names, fixed, f"must leave {name} out: its replicas are {{min, max}}; write a number there"
        remedy = "must be pack: replicas of stages in share_gpu lie together on one GPU's node"
        yield f"stages.{name}.placement", stage.placement, stage.placement == "pack", remedy
    numbers = ", ".join(f"{name} {stage.replicas}" for name, stage in sharing.items())
    ok = len({stage.replicas for stage in sharing.values()}) <= 1
    yield "share_gpu", names, ok, f"must have the same number of replicas each; they have {numbers}"
    gpus = sum(s.num_gpus for s in sharing.values())
    yield (
        "share_gpu",
        names,
        gpus <= 1,
        f"their num_gpus add up to {gpus:g} and must be at most 1; lower them or write []",
    )
    yield from _node_checks(sharing)


def _node_checks(sharing: Mapping[str, StageConfig]) -> Iterator[Check]:
    """Yield where stages of one GPU want it on different nodes."""
    for (one, first), (other, second) in combinations(sharing.items(), 2):
        kind, wanted = second.accelerator_type, first.accelerator_type
        remedy = f"must be as stages.{one}, whose GPU it shares: {wanted}"
        yield f"stages.{other}.accelerator_type", kind, None in (kind, wanted) or kind == wanted, remedy
        for label in first.label_selector.keys() & second.label_selector.keys():
            value, wanted = second.label_selector[label], first.label_selector[label]
            remedy = f"must be as stages.{one}, whose GPU it shares: {wanted}"
            yield f"stages.{other}.label_selector.{label}", value, value == wanted, remedy


def _failure_checks(failures: FailuresConfig) -> Iterator[Check]:
    yield "failures.max_attempts", failures.max_attempts, failures.max_attempts >= 1, at_least(1)
    stall, limit, grace = failures.stall_s, failures.timeout_s, failures.shutdown_grace_s
    yield "failures.stall_s", stall, 1 <= stall < math.inf, at_least(1)
    yield "failures.answer_s", failures.answer_s, 1 <= failures.answer_s < math.inf, at_least(1)
    yield "failures.timeout_s", limit, limit is None or 0 < limit < math.inf, "must be a positive number, or null"
    yield "failures.shutdown_grace_s", grace, 0 <= grace < math.inf, at_least(0)


def _service_checks(service: ServiceConfig) -> Iterator[Check]:
    for f in fields(service):
        value = getattr(service, f.name)
        if not isinstance(value, bool):
            yield f"service.{f.name}", value, 0 < value < math.inf, "must be a positive number"


def _transport_checks(transport: TransportConfig) -> Iterator[Check]:
    yield one_of("transport.protocol", transport.protocol, PROTOCOLS)
    yield one_of("transport.admit", transport.admit, ADMITTED)
    device, protocol = transport.device_name, transport.protocol
    remedy = f"must be left out: it is for rdma or auto, and transport.protocol is {protocol}"
    yield "transport.device_name", device, not device or protocol in ("auto", "rdma"), remedy
    server = transport.metadata_server
    ok = bool(server) and MASK not in server
    yield "transport.metadata_server", server, ok, f"must be P2PHANDSHAKE or an address, with its password for {MASK}"
    timeout, ports = transport.timeout_s, transport.port_range
    yield "transport.timeout_s", timeout, 5 <= timeout < math.inf, at_least(5)
    ok = ports is None or _is_port_range(ports)
    yield "transport.port_range", ports, ok, "must be FIRST-LAST, as 15000-15999, or null"
    for key in ("pool_bytes", "driver_pool_bytes"):
        value = getattr(transport, key)
        ok = value == "auto" or (isinstance(value, int) and value > 0)
        yield f"transport.{key}", value, ok, "must be auto or a number of bytes"


def _cluster_checks(cluster: ClusterConfig) -> Iterator[Check]:
    start, gpus = cluster.start_timeout_s, cluster.num_gpus
    yield "cluster.start_timeout_s", start, 0 < start < math.inf, "must be a positive number of seconds"
    yield "cluster.num_gpus", gpus, gpus is None or gpus >= 0, "must be at least 0, or null"
    if cluster.address is not None:
        yield from joining_checks(cluster, cluster.address)


def joining_checks(cluster: ClusterConfig, address: str) -> Iterator[Check]:
    """Yield what has no effect on a cluster that is joined."""
    remedy = f"must be left out: it is for a cluster of our own, and the one of {printable(mask(address))} is joined"
    yield "cluster.num_gpus", cluster.num_gpus, cluster.num_gpus is None, remedy
    yield "cluster.dashboard", cluster.dashboard, not cluster.dashboard, remedy


def _is_port_range(text: str) -> bool:
    first, dash, last = text.partition("-")
    digits = bool(dash) and all(part.isascii() and part.isdigit() and len(part) <= 5 for part in (first, last))
    return digits and 1024 <= int(first) <= int(last) <= 65535

"""The configuration schema: each key once, with its meaning and its default.

OmegaConf merges the YAML files (`base:` names the file below) and the dotted overrides; everything past this module
sees only the frozen dataclasses.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]  # the parser below OmegaConf, for its errors
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from disagg_ray.environment import expand_home
from disagg_ray.errors import ConfigError
from disagg_ray.options import (
    OFFLOADS,
    SCHEDULERS,
    Check,
    DenoiserConfig,
    VaeConfig,
    denoiser_checks,
    size_checks,
)

MULTIPLE = 16
"""Height and width are multiples of the VAE's factor 8 times the transformer's patch of 2."""
TASKS = ("t2v", "i2v", "flf2v")
PROTOCOLS = ("auto", "nvlink_intra", "rdma", "tcp")
DTYPES = ("float32", "bfloat16", "float16")
T = TypeVar("T")
REPLICA_WINDOW = 2  # a replica holds one request that computes and one that is prefetched


@dataclass(frozen=True)
class DtypeConfig:
    text_encoder: str = "bfloat16"
    """UMT5."""
    image_encoder: str = "float32"
    """CLIP, as the published pipelines load it."""
    transformer: str = "bfloat16"
    """Both transformers of Wan 2.2."""
    vae: str = "float32"
    """Encoder and decoder half alike."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = "???"
    """A diffusers-format folder, a hub id (`org/name`), `builtin:NAME` for a tiny trained model that comes with the
    package, or `random:SHAPE` for seeded random weights."""
    task: str = "t2v"
    """What the model makes a video from: t2v (text), i2v (text and first image), flf2v (first and last image)."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; required for one, so that every node loads the same weights."""
    flow_shift: float | None = None
    """Shift of the flow-matching schedule; null: what the checkpoint's scheduler says."""
    scheduler: str | None = None
    """unipc or euler, with the checkpoint's shift; null: the checkpoint's scheduler."""
    sigmas: list[float] = field(default_factory=list)
    """Noise levels of the steps, falling from 1, for step-distilled checkpoints: every request takes that many steps.
    The shift is applied to them, as diffusers does; flow_shift: 1 takes them as they are. []: spread over the steps."""
    boundary_ratio: float | None = None
    """Wan 2.2: share of the timesteps from which the low-noise transformer takes over; null: the checkpoint's."""
    max_sequence_length: int = 512
    """Text tokens the transformer attends to; shorter prompts are padded to it."""
    dtype: DtypeConfig = field(default_factory=DtypeConfig)
    """Precision of each component's weights."""


@dataclass(frozen=True)
class DefaultsConfig:
    """What a request gets for a field that it leaves out."""

    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    num_frames: int = 81
    """Frames, 4k + 1."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 or less turns it off."""
    guidance_scale_2: float | None = None
    """Guidance of the low-noise transformer; null: the model has only one transformer."""
    negative_prompt: str = ""
    """What guidance steers away from."""
    fps: int = 16
    """Frames a second of the written video."""


@dataclass(frozen=True)
class LimitsConfig:
    """The largest request that is admitted; pools are sized for it."""

    max_pixels: int = 1280 * 720
    """Height x width."""
    max_frames: int = 121
    """Frames."""
    max_steps: int = 200
    """Denoising steps."""
    max_prompt_chars: int = 10_000
    """Characters of prompt and of negative prompt."""
    max_image_pixels: int = 4096 * 4096
    """Height x width of a conditioning image as given, before it is resized."""
    max_queued: int = 256
    """Requests that wait to be started; `submit` past it waits or raises Overloaded."""


@dataclass(frozen=True)
class GroupConfig:
    """Replicas of a stage on one kind of hardware; what is null is as the stage says."""

    replicas: int = 1
    """Actors of this group."""
    accelerator_type: str | None = None
    """As in StageConfig, like all below."""
    num_gpus: float | None = None
    num_cpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] | None = None
    label_selector: dict[str, str] | None = None


@dataclass(frozen=True)
class StageConfig:
    blocks: list[str] = field(default_factory=list)
    """Top-level blocks of the checkpoint's diffusers modular pipeline, in order."""
    replicas: int = 1
    """Actors of this stage; of a standing pipeline's, {min: A, max: B} lets the load decide."""
    min_replicas: int | None = None
    """What {min, max} says; null: as many as `replicas`."""
    max_replicas: int | None = None
    """The same; pools are sized for as many."""
    num_gpus: float = 0.0
    """GPUs of each replica; a fraction shares one."""
    num_cpus: float = 1.0
    """CPUs Ray reserves for each replica."""
    memory: int | None = None
    """Bytes of host memory Ray reserves for each replica; null: none."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources of each replica, by name."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Labels a replica's node must have, as `ray.io/accelerator-type: H100`, `zone: "!b"` or `disk: in(ssd,nvme)`."""
    accelerator_type: str | None = None
    """Ray's name of the GPU each replica must have, as H200 or L40S; null: any."""
    placement: str = "pack"
    """pack (fill nodes that are in use first) or spread (over as many nodes as there are)."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Replicas on mixed hardware, by a name of your choice; when given, they take the place of `replicas`."""
    num_threads: int | None = None
    """Torch threads; null: num_cpus rounded up. Frames are bit-identical only for equal thread counts."""
    dtype: str | None = None
    """Overrides model.dtype for every component of this stage."""
    device: str = "auto"
    """auto (cuda with num_gpus, else cpu), cpu or cuda."""
    gpu_bytes: int | None = None
    """Most memory that torch takes of the GPU for each replica; more fails there alone. null: all there is."""
    cache_bytes: int = 64 * 2**20
    """Registered memory in which a text encoder keeps prompt embeddings for the next request with the same text; they
    give way when its outputs need the room. 0: none."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """How its transformers run."""
    vae: VaeConfig = field(default_factory=VaeConfig)
    """How its VAE runs."""
    offload: str = "none"
    """Where weights wait: none (on the device), group (on the host, but for the layers at work) or model (on the host,
    but for the component at work)."""
    warm_up: list[list[int]] = field(default_factory=list)
    """[height, width, num_frames] that are run once at start, so that no request of that size pays for compiling and
    measuring."""

    @property
    def num_replicas(self) -> int:
        return sum(group.replicas for group in self.replica_groups.values())

    @property
    def most_replicas(self) -> int:
        return max(self.num_replicas, self.max_replicas or 0)

    @property
    def replica_groups(self) -> dict[str, StageConfig]:
        """The stage as each group of its replicas sees it, by the group's name."""
        if not self.groups:
            return {"": self}
        return {
            name: replace(self, groups={}, **{k: v for k, v in vars(group).items() if v is not None})
            for name, group in self.groups.items()
        }

    @property
    def torch_threads(self) -> int:
        return self.num_threads or max(1, math.ceil(self.num_cpus))

    @property
    def torch_device(self) -> str:
        if self.device == "auto":
            return "cuda" if self.num_gpus > 0 else "cpu"
        return self.device


@dataclass(frozen=True)
class TransportConfig:
    """How tensors travel between pools; names are Mooncake's own."""

    protocol: str = "auto"
    """auto (for each pair of pools the best that both have), or one of Mooncake's: nvlink_intra, rdma, tcp."""
    device_name: str = ""
    """RDMA devices, comma separated; empty: Mooncake chooses."""
    metadata_server: str = "P2PHANDSHAKE"
    """P2PHANDSHAKE needs no server; else an etcd, redis or http address that Mooncake knows."""
    port_range: str | None = None
    """`FIRST-LAST` bounds of the ports Mooncake may listen on, for a firewall; null: any free port."""
    pool_bytes: int | str = "auto"
    """Registered memory of each replica; auto: the largest request that limits allows times what is in flight."""
    driver_pool_bytes: int | str = "auto"
    """Registered host memory of the driver."""
    verify: bool = True
    """Check a checksum of every pulled tensor."""
    timeout_s: float = 30.0
    """Deadline of one pull; Mooncake takes no less than 5."""


@dataclass(frozen=True)
class FailuresConfig:
    max_attempts: int = 3
    """Times a stage is computed for a request before the request fails; a lost node does not count."""
    stall_s: float = 600.0
    """A replica that finishes no denoising step, encode or decode for so long is replaced."""
    answer_s: float = 60.0
    """So is one that does not say how it is for so long, or for `stall_s`; computing, it does so within a second."""
    timeout_s: float | None = None
    """Limit of a request from admission to its last byte; null: none."""
    shutdown_grace_s: float = 30.0
    """What running requests get to finish when a run is told to stop."""


@dataclass(frozen=True)
class StandingConfig:
    """Pipelines that stay up and serve many drivers (`disagg-ray up`)."""

    driver_timeout_s: float = 60.0
    """A driver that is not heard of for so long has its requests cancelled."""
    target_wait_s: float = 60.0
    """A stage with {min, max} replicas gets another one while new work would wait longer than this."""
    patience_s: float = 15.0
    """How long it must be so before one is added."""
    idle_s: float = 300.0
    """How long a stage must have a replica to spare before one is taken away."""
    cluster_grows: bool = False
    """Ask for replicas that the cluster has no room for: its autoscaler will make some."""
    latents_bytes: int = 8 * 2**30
    """Most disk space for finished latents of drivers that may come back."""
    latents_expire_s: float = 86400.0
    """How long they are kept."""


@dataclass(frozen=True)
class OutputConfig:
    scale: int = 1
    """Whole number by which mp4 and gif are enlarged for viewing; png and npy are the frames as they are."""


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None
    """Ray cluster to join; null: RAY_ADDRESS if set, else one of our own on this machine."""
    num_gpus: int | None = None
    """GPUs of a cluster of our own; null: those Ray finds."""
    dashboard: bool = False
    """Start the Ray dashboard in a cluster of our own."""
    start_timeout_s: float = 1800.0
    """Until every replica must be ready, downloads and loading included."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, in any order: the graph is inferred from their blocks."""
    share_gpu: list[str] = field(default_factory=list)
    """Stages whose replicas lie on one GPU: the first of each together, the second of each, and so on."""
    transport: TransportConfig = field(default_factory=TransportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    standing: StandingConfig = field(default_factory=StandingConfig)
    progress: bool = True
    """Have replicas tell of their steps, over an encrypted port that the driver opens on its node."""
    output: OutputConfig = field(default_factory=OutputConfig)
    fused: bool = False
    """Run the blocks of all stages in one, named `fused`, with the largest of their resources."""

    def __post_init__(self) -> None:
        for key, value, ok, remedy in _checks(self):
            if not ok:
                raise ConfigError(f"{key}: {value!r} is not possible: {remedy}")

    @property
    def max_in_flight(self) -> int:
        """Most requests the driver admits at once: what all replicas together can hold."""
        return sum(REPLICA_WINDOW * stage.most_replicas for stage in self.stages.values())

    def for_group(self, stage: str, group: str) -> Config:
        """Return the configuration as a replica of a stage's group sees it."""
        settings = replace(self.stages[stage].replica_groups[group], groups=self.stages[stage].groups)
        return replace(self, stages=self.stages | {stage: settings})

    def dtype_of(self, stage: str, component: str) -> str:
        """Return the precision in which a stage holds a component's weights."""
        by_component = {f.name: getattr(self.model.dtype, f.name) for f in fields(DtypeConfig)}
        name = "transformer" if component == "transformer_2" else component
        return self.stages[stage].dtype or by_component.get(name, "float32")


def _checks(config: Config) -> Iterator[Check]:
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
    for f in fields(DtypeConfig):
        dtype = getattr(model.dtype, f.name)
        yield f"model.dtype.{f.name}", dtype, dtype in DTYPES, f"write one of {', '.join(DTYPES)}"
    for f in fields(LimitsConfig):
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
    for f in fields(StandingConfig):
        value = getattr(standing, f.name)
        if not isinstance(value, bool):
            yield f"standing.{f.name}", value, 0 < value < math.inf, "write a positive number"


def _is_port_range(text: str) -> bool:
    first, dash, last = text.partition("-")
    return bool(dash) and first.isdigit() and last.isdigit() and 1024 <= int(first) <= int(last) <= 65535


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file, the `base:` files below it and dotted overrides (`stages.transformer.replicas=2`).

    Raises:
        ConfigError: names the key, the value and the nearest right key.
    """
    merged = OmegaConf.structured(Config)
    OmegaConf.set_readonly(merged, False)
    for source, layer in (*_layers(expand_home(path)), *map(_parse_override, overrides)):
        with _named_errors(source, layer):
            _drop_stages(merged, layer)
            _spread_bounds(layer)
            merged = OmegaConf.unsafe_merge(merged, layer)
    with _named_errors(str(path), merged):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    folder = expand_home(config.model.path)
    if folder.is_dir():  # replicas have other working folders
        config = replace(config, model=replace(config.model, path=str(folder.absolute())))
    return replace(config, stages={"fused": _fuse(config.stages.values())}, share_gpu=[]) if config.fused else config


def _drop_stages(merged: DictConfig, layer: DictConfig) -> None:
    """Let a stage that a layer sets to null go, so that others can take its blocks."""
    stages = layer.get("stages")
    if isinstance(stages, DictConfig):
        for name in [name for name, stage in stages.items() if stage is None]:
            del stages[name]
            merged.stages.pop(name, None)


def _spread_bounds(layer: DictConfig) -> None:
    """Read `replicas: {min, max}` as the least number to start with and the bounds; a plain number has none."""
    stages = layer.get("stages")
    for name in map(str, stages) if isinstance(stages, DictConfig) else ():
        stage = stages.get(name)
        if not isinstance(stage, DictConfig) or "replicas" not in stage:
            continue
        bounds = stage.replicas
        if not isinstance(bounds, DictConfig):
            stage.setdefault("min_replicas", None)
            stage.setdefault("max_replicas", None)
        elif set(bounds) != {"min", "max"}:
            raise ConfigError(f"stages.{name}.replicas: {dict(bounds)} is not possible: write a number, or min and max")
        else:
            stage.replicas, stage.min_replicas, stage.max_replicas = bounds["min"], bounds["min"], bounds["max"]


def _fuse(stages: Collection[StageConfig]) -> StageConfig:
    threads = [stage.num_threads for stage in stages if stage.num_threads is not None]
    dtypes = {stage.dtype for stage in stages}
    return StageConfig(
        blocks=[block for stage in stages for block in stage.blocks],
        replicas=max(stage.num_replicas for stage in stages),
        num_gpus=max(stage.num_gpus for stage in stages),
        num_cpus=max(stage.num_cpus for stage in stages),
        num_threads=max(threads, default=None),
        memory=max((stage.memory for stage in stages if stage.memory is not None), default=None),
        gpu_bytes=max((stage.gpu_bytes for stage in stages if stage.gpu_bytes is not None), default=None),
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
        cache_bytes=max(stage.cache_bytes for stage in stages),
        denoiser=_only("denoiser", [stage.denoiser for stage in stages], DenoiserConfig()),
        vae=_only("vae", [stage.vae for stage in stages], VaeConfig()),
        offload=_only("offload", [stage.offload for stage in stages], "none"),
        warm_up=[list(size) for size in dict.fromkeys(tuple(size) for stage in stages for size in stage.warm_up)],
    )


def _only(key: str, values: Iterable[T], default: T) -> T:
    """Return the one value that differs from the default, or the default."""
    asked: list[T] = []
    for value in values:
        if value != default and value not in asked:
            asked.append(value)
    if len(asked) > 1:
        raise ConfigError(f"fused: stages ask for different {key}: {asked[0]!r} and {asked[1]!r}; write one of them")
    return asked[0] if asked else default


@contextmanager
def _named_errors(source: str, layer: DictConfig) -> Iterator[None]:
    """Name the key of whatever OmegaConf refuses, or else the file or override it stands in."""
    try:
        yield
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ConfigError(_unknown_key(str(error.full_key), OmegaConf.select(layer, str(error.full_key)))) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: not given; write it in {source} or as {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or source}: {str(error).splitlines()[0]}") from error
    except TypeError as error:  # a list where keys belong, or the other way round
        raise ConfigError(f"{source}: {_one_line(error)}") from error


def _layers(path: Path) -> list[tuple[str, DictConfig]]:
    """Return the file and those it builds on with their names, lowest first."""
    layers: list[tuple[str, DictConfig]] = []
    seen: set[Path] = set()
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ConfigError(f"base: {following} builds on itself")
        seen.add(following.resolve())
        layer = _read_yaml(following)
        below = layer.pop("base", None)
        layers.insert(0, (str(following), layer))
        following = following.parent / str(below) if below else None
    return layers


def _read_yaml(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            f"config: {str(path)!r} is not a file; give the path of a YAML file such as conf/tiny_t2v.yaml"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: {str(path)!r} cannot be read: {_one_line(error)}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {str(path)!r} is not YAML: {_one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"config: {str(path)!r} must hold keys and values")
    return layer


def _parse_override(override: str) -> tuple[str, DictConfig]:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override: {override!r} is not KEY=VALUE, as stages.transformer.replicas=2")
    try:
        return override, OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override: {override!r} is not YAML after the =: {_one_line(error)}") from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def known_keys() -> list[str]:
    """Return every dotted key of the schema; a stage's name stands as `*`."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            value = getattr(node, f.name)
            yield prefix + f.name
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")

    sections = (
        ModelConfig, DefaultsConfig, LimitsConfig, TransportConfig, ClusterConfig, FailuresConfig, StandingConfig,
        OutputConfig,
    )  # fmt: skip
    names = ("model", "defaults", "limits", "transport", "cluster", "failures", "standing", "output")
    keys = [*names, "stages", "share_gpu", "progress", "fused"]
    for name, section in zip(names, sections, strict=True):
        keys += walk(section(), f"{name}.")
    return keys + list(walk(StageConfig(), "stages.*."))


def _unknown_key(key: str, value: object) -> str:
    parts = key.split(".")
    shown = [k.replace("*", parts[1]) if len(parts) > 1 else k for k in known_keys()]
    leaf = {k.rsplit(".", 1)[-1]: k for k in shown}
    near = difflib.get_close_matches(key, shown, n=1, cutoff=0.6)
    near = near or [leaf[n] for n in difflib.get_close_matches(parts[-1], leaf, n=1, cutoff=0.6)]
    return f"{key}: no such key for {value!r}" + (
        f"; did you mean {near[0]}?" if near else "; `disagg-ray config` prints them all"
    )


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))

"""The configuration schema: each key once, with its meaning and its default.

OmegaConf merges the YAML files (`base:` names the file below) and the dotted overrides; everything past this module
sees only the frozen dataclasses.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from disagg_ray.errors import ConfigError

TASKS = ("t2v", "i2v", "flf2v")
DTYPES = ("float32", "bfloat16", "float16")
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
    """A diffusers-format folder, a hub id (`org/name`), or `random:SHAPE` for seeded random weights."""
    task: str = "t2v"
    """What the model makes a video from: t2v (text), i2v (text and first image), flf2v (first and last image)."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; required for one, so that every node loads the same weights."""
    flow_shift: float | None = None
    """Shift of the flow-matching schedule; null: what the checkpoint's scheduler says."""
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


@dataclass(frozen=True)
class StageConfig:
    blocks: list[str] = field(default_factory=list)
    """Top-level blocks of the checkpoint's diffusers modular pipeline, in order."""
    replicas: int = 1
    """Actors of this stage."""
    num_gpus: float = 0.0
    """GPUs of each replica; a fraction shares one."""
    num_cpus: float = 1.0
    """CPUs Ray reserves for each replica."""
    num_threads: int | None = None
    """Torch threads; null: num_cpus rounded up. Frames are bit-identical only for equal thread counts."""
    dtype: str | None = None
    """Overrides model.dtype for every component of this stage."""
    device: str = "auto"
    """auto (cuda with num_gpus, else cpu), cpu or cuda."""

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

    protocol: str = "tcp"
    """Mooncake transport: tcp or rdma."""
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
    transport: TransportConfig = field(default_factory=TransportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        for key, value, ok, remedy in _checks(self):
            if not ok:
                raise ConfigError(f"{key}: {value!r} is not possible: {remedy}")

    @property
    def max_in_flight(self) -> int:
        """Requests the driver admits at once: what all replicas together can hold."""
        return sum(REPLICA_WINDOW * stage.replicas for stage in self.stages.values())

    def dtype_of(self, stage: str, component: str) -> str:
        """Return the precision in which a stage holds a component's weights."""
        by_component = {f.name: getattr(self.model.dtype, f.name) for f in fields(DtypeConfig)}
        name = "transformer" if component == "transformer_2" else component
        return self.stages[stage].dtype or by_component.get(name, "float32")


Check = tuple[str, object, bool, str]


def _checks(config: Config) -> Iterator[Check]:
    """Yield (key, value, whether it is possible, remedy)."""
    model, defaults, limits, transport = config.model, config.defaults, config.limits, config.transport
    yield "model.task", model.task, model.task in TASKS, f"write one of {', '.join(TASKS)}"
    yield "model.max_sequence_length", model.max_sequence_length, model.max_sequence_length >= 1, "write 1 or more"
    shift = model.flow_shift
    yield "model.flow_shift", shift, shift is None or (math.isfinite(shift) and shift > 0), "write a positive number"
    ratio = model.boundary_ratio
    yield "model.boundary_ratio", ratio, ratio is None or 0 <= ratio <= 1, "write a number from 0 to 1"
    for f in fields(DtypeConfig):
        dtype = getattr(model.dtype, f.name)
        yield f"model.dtype.{f.name}", dtype, dtype in DTYPES, f"write one of {', '.join(DTYPES)}"
    for f in fields(LimitsConfig):
        yield f"limits.{f.name}", getattr(limits, f.name), getattr(limits, f.name) >= 1, "write 1 or more"
    size = defaults.height * defaults.width
    yield "defaults.height x width", size, size <= limits.max_pixels, f"limits.max_pixels is {limits.max_pixels}"
    frames = defaults.num_frames
    yield "defaults.num_frames", frames, frames <= limits.max_frames, f"limits.max_frames is {limits.max_frames}"
    yield "defaults.fps", defaults.fps, 1 <= defaults.fps <= 240, "write 1 to 240"
    yield from _stage_checks(config.stages)
    yield "transport.protocol", transport.protocol, transport.protocol in ("tcp", "rdma"), "write tcp or rdma"
    yield "transport.timeout_s", transport.timeout_s, transport.timeout_s >= 5, "write 5 or more"
    ports = transport.port_range
    yield "transport.port_range", ports, ports is None or _is_port_range(ports), "write FIRST-LAST, as 15000-15999"
    for key in ("pool_bytes", "driver_pool_bytes"):
        value = getattr(transport, key)
        ok = value == "auto" or (isinstance(value, int) and value > 0)
        yield f"transport.{key}", value, ok, "write auto or a number of bytes"
    start = config.cluster.start_timeout_s
    yield "cluster.start_timeout_s", start, start > 0, "write a positive number of seconds"


def _stage_checks(stages: Mapping[str, StageConfig]) -> Iterator[Check]:
    yield "stages", sorted(stages), bool(stages), "name at least one stage"
    for name, stage in stages.items():
        key = f"stages.{name}"
        yield key, name, name.isidentifier() and name.islower(), "name it in lower-case letters, digits and _"
        yield f"{key}.blocks", stage.blocks, bool(stage.blocks), "name at least one block"
        yield f"{key}.replicas", stage.replicas, stage.replicas >= 1, "write 1 or more"
        whole = stage.num_gpus <= 1 or stage.num_gpus == int(stage.num_gpus)
        yield f"{key}.num_gpus", stage.num_gpus, stage.num_gpus >= 0 and whole, "write a fraction or a whole number"
        yield f"{key}.num_cpus", stage.num_cpus, stage.num_cpus >= 0, "write 0 or more"
        threads = stage.num_threads
        yield f"{key}.num_threads", threads, threads is None or threads >= 1, "write 1 or more, or null"
        yield f"{key}.dtype", stage.dtype, stage.dtype in (None, *DTYPES), f"write one of {', '.join(DTYPES)}"
        yield f"{key}.device", stage.device, stage.device in ("auto", "cpu", "cuda"), "write auto, cpu or cuda"


def _is_port_range(text: str) -> bool:
    first, dash, last = text.partition("-")
    return bool(dash) and first.isdigit() and last.isdigit() and 1024 <= int(first) <= int(last) <= 65535


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file, the `base:` files below it and dotted overrides (`stages.transformer.replicas=2`).

    Raises:
        ConfigError: names the key, the value and the nearest right key.
    """
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    try:
        merged = OmegaConf.merge(schema, *_layers(Path(path)), _parse_overrides(overrides))
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ConfigError(_unknown_key(str(error.full_key))) from error
    except OmegaConfBaseException as error:
        key, reason = error.full_key or "the file", str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{key}: {reason}") from error
    assert isinstance(config, Config)
    return config


def _layers(path: Path) -> list[DictConfig]:
    """Return the file and those it builds on, lowest first."""
    layers: list[DictConfig] = []
    seen: set[Path] = set()
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ConfigError(f"base: {following} builds on itself")
        seen.add(following.resolve())
        layer = _read_yaml(following)
        below = layer.pop("base", None)
        layers.insert(0, layer)
        following = following.parent / str(below) if below else None
    return layers


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(
            f"config: {str(path)!r} is not a file; give the path of a YAML file such as conf/tiny_t2v.yaml"
        )
    try:
        layer = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"config: {str(path)!r} cannot be read as YAML: {error}") from error
    except Exception as error:  # PyYAML's errors have no common importable base here: the parser is OmegaConf's
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise ConfigError(f"config: {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"config: {str(path)!r} must hold keys and values")
    return layer


def _parse_overrides(overrides: tuple[str, ...]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override: {override!r} is not KEY=VALUE, as stages.transformer.replicas=2")
    return OmegaConf.from_dotlist(list(overrides))


def known_keys() -> list[str]:
    """Return every dotted key of the schema; a stage's name stands as `*`."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            value = getattr(node, f.name)
            yield prefix + f.name
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")

    sections = (ModelConfig, DefaultsConfig, LimitsConfig, TransportConfig, ClusterConfig)
    names = ("model", "defaults", "limits", "transport", "cluster")
    keys = [*names, "stages"]
    for name, section in zip(names, sections, strict=True):
        keys += walk(section(), f"{name}.")
    return keys + [f"stages.*.{f.name}" for f in fields(StageConfig)]


def _unknown_key(key: str) -> str:
    parts = key.split(".")
    shown = [k.replace("*", parts[1]) if len(parts) > 1 else k for k in known_keys()]
    leaf = {k.rsplit(".", 1)[-1]: k for k in shown}
    near = difflib.get_close_matches(key, shown, n=1, cutoff=0.6)
    near = near or [leaf[n] for n in difflib.get_close_matches(parts[-1], leaf, n=1, cutoff=0.6)]
    return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "; `disagg-ray config` prints them all")


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))

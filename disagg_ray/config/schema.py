"""The configuration schema: each key once, with its meaning and its default.

`loading` makes one of files and overrides, `checks` says what is possible; everything past them sees only these frozen
dataclasses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from disagg_ray.config.options import Check, DenoiserConfig, VaeConfig, parse_part
from disagg_ray.config.rules import config_checks, joining_checks
from disagg_ray.errors import ConfigError
from disagg_ray.text import printable, shown

REPLICA_WINDOW = 2
"""A replica takes one request to compute and one to prefetch."""


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
    """Top-level blocks of the checkpoint's diffusers modular pipeline, in order. In place of `decode` several stages
    may share its tiles, as `decode.1of2` and `decode.2of2`, and one more makes the video of them, `blend`."""
    replicas: int = 1
    """Actors of this stage; with `disagg-ray up`, {min: A, max: B} lets the load decide."""
    min_replicas: int | None = None
    """What {min, max} says; null: as many as `replicas`."""
    max_replicas: int | None = None
    """The same; pools are sized for as many."""
    num_gpus: float = 0.0
    """GPUs of each replica, from 0 to 1; a fraction shares one."""
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
    """pack (fill nodes that are in use first) or spread (over as many nodes as there are; not with share_gpu)."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Replicas on mixed hardware, by a name of your choice; when given, they take the place of `replicas`."""
    num_threads: int | None = None
    """Torch threads; null: num_cpus rounded up. Frames are bit-identical only for equal thread counts."""
    dtype: str | None = None
    """Overrides model.dtype for every component of this stage."""
    device: str = "auto"
    """auto (cuda with num_gpus, else cpu), cpu or cuda."""
    max_vram_bytes: int | None = None
    """Most memory that torch takes of the GPU for each replica; more fails there alone. null: all there is. For stages
    on a GPU only."""
    cache_bytes: int = 64 * 2**20
    """Registered memory in which a stage with the block text_encoder keeps prompt embeddings for the next request with
    the same text; they give way when its outputs need the room. 0: none."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """How its transformers run."""
    vae: VaeConfig = field(default_factory=VaeConfig)
    """How its VAE runs."""
    offload: str = "none"
    """Where weights wait: none (on the device) or, for stages on a GPU, group (on the host, but for the layers at work)
    or model (on the host, but for the component at work)."""
    warm_up: list[list[int]] = field(default_factory=list)
    """[height, width, num_frames] that are run once at start, so that no request of that size pays for compiling and
    measuring."""

    @property
    def num_replicas(self) -> int:
        return sum(group.replicas for group in self.replica_groups.values())

    @property
    def least_replicas(self) -> int:
        return self.min_replicas or self.num_replicas

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
    """`FIRST-LAST` bounds of the ports that Mooncake and the progress may listen on, for a firewall: three for each
    route of each pool, one for each driver's progress; null: any free port."""
    admit: str = "auto"
    """Who may connect to those ports: host (this machine alone), any, or auto (host where disagg-ray starts the
    cluster itself, else any)."""
    pool_bytes: int | str = "auto"
    """Registered memory of each replica; auto: the largest request that limits allows, times those that are at one
    replica when it does twice its share. What is too little for requests never to wait for each other is refused."""
    driver_pool_bytes: int | str = "auto"
    """Registered host memory of the driver."""
    verify: bool = True
    """Check a checksum of every pulled tensor."""
    timeout_s: float = 30.0
    """Deadline of one pull; Mooncake takes no less than 5."""

    @property
    def ports(self) -> range | None:
        """Those of `port_range`."""
        if self.port_range is None:
            return None
        first, _, last = self.port_range.partition("-")
        return range(int(first), int(last) + 1)


@dataclass(frozen=True)
class FailuresConfig:
    max_attempts: int = 3
    """Times a stage is computed for a request before the request fails; a lost node does not count, nor does a replica
    that is lost before it computes."""
    stall_s: float = 600.0
    """A replica that makes no progress for so long is replaced: no denoising step, and no end of an encode, a decode,
    a pull (which has `transport.timeout_s` first), or of writing a file. Waiting for room or for a GPU is no hang."""
    answer_s: float = 60.0
    """So is one that does not say how it is for so long, or for `stall_s`; computing, it does so within a second."""
    timeout_s: float | None = None
    """Limit of a request from admission to its last byte; null: none."""
    shutdown_grace_s: float = 30.0
    """What running requests get to finish when a run is told to stop."""


@dataclass(frozen=True)
class ServiceConfig:
    """Pipelines that stay up and serve many drivers (`disagg-ray up`)."""

    client_timeout_s: float = 60.0
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
    """GPUs of a cluster of our own, not of one that is joined; null: those Ray finds."""
    dashboard: bool = False
    """Start the Ray dashboard in a cluster of our own, not in one that is joined."""
    start_timeout_s: float = 1800.0
    """Until every replica must be ready, downloads and loading included; and how long requests wait for a stage that
    has lost all its replicas."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, in any order: the graph is inferred from their blocks."""
    share_gpu: list[str] = field(default_factory=list)
    """Stages whose replicas lie on one GPU: the first of each together, the second of each, and so on."""
    gpu_turns: bool = True
    """Have the models of replicas that share a GPU compute one after the other; false: as CUDA lets them (MPS)."""
    transport: TransportConfig = field(default_factory=TransportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    progress: bool = True
    """Have replicas tell of their steps, over an encrypted port that the driver opens on its node."""
    output: OutputConfig = field(default_factory=OutputConfig)
    fused: bool = False
    """Run the blocks of all stages in one, named `fused`: with the largest of their resources and the sum of their
    memory; what one stage cannot have at once is refused."""

    def __post_init__(self) -> None:
        _refuse_first(config_checks(self))

    @property
    def max_in_flight(self) -> int:
        """Most requests the driver admits at once: what all replicas together can hold."""
        return sum(REPLICA_WINDOW * stage.most_replicas for stage in self.stages.values())

    @property
    def num_parts(self) -> int:
        """How many blocks share the tiles of a decode; 0: one decodes the whole."""
        return sum(parse_part(block) is not None for stage in self.stages.values() for block in stage.blocks)

    def for_group(self, stage: str, group: str) -> Config:
        """Return the configuration as a replica of a stage's group sees it."""
        settings = replace(self.stages[stage].replica_groups[group], groups=self.stages[stage].groups)
        return replace(self, stages=self.stages | {stage: settings})

    def takes_turns(self, stage: str) -> bool:
        """Return whether a stage's replicas compute by turns with those of other processes on their GPU."""
        settings = self.stages[stage]
        return self.gpu_turns and settings.torch_device == "cuda" and settings.num_gpus < 1

    def dtype_of(self, stage: str, component: str) -> str:
        """Return the precision in which a stage holds a component's weights."""
        by_component = {f.name: getattr(self.model.dtype, f.name) for f in fields(DtypeConfig)}
        name = "transformer" if component == "transformer_2" else component
        return self.stages[stage].dtype or by_component.get(name, "float32")


def check_joining(cluster: ClusterConfig, address: str) -> None:
    """Check that nothing is asked of a cluster that is there already.

    Raises:
        ConfigError: names the key.
    """
    _refuse_first(joining_checks(cluster, address))


def _refuse_first(checks: Iterable[Check]) -> None:
    for key, value, ok, remedy in checks:
        if not ok:
            raise ConfigError(f"invalid {printable(key)}={shown(value)}: {remedy}")

"""The configuration schema: each key once, with its meaning, its default and what it must be.

`load` makes one of files and overrides; everything past it sees only these frozen dataclasses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Self

from disagg_ray.config.deployment import ClusterConfig, FailuresConfig, OutputConfig, ServiceConfig
from disagg_ray.config.model import ModelConfig
from disagg_ray.config.options import parse_part
from disagg_ray.config.rules import Check, Count, Fps, Guidance, Section, at_most, checks, enforce, one_of
from disagg_ray.config.speed import SPEEDS
from disagg_ray.config.stages import StageConfig, cut_rules, sharing_rules
from disagg_ray.config.traits import family_rules, shape_rules, token_rules
from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import ConfigError
from disagg_ray.models.families import FAMILIES

REPLICA_WINDOW = 2
"""A replica takes one request to compute and one to prefetch."""


@dataclass(frozen=True)
class DefaultsConfig(Section):
    """Values of the fields that a request leaves out."""

    height: int = 480
    """Pixels; a multiple of 16, or of what model.task wants (ti2v: 32)."""
    width: int = 832
    """Pixels; a multiple as height."""
    num_frames: int = 81
    """Frames, 4k + 1; of an image 1."""
    num_inference_steps: Count = 50
    """Denoising steps. Time grows in proportion."""
    guidance_scale: Guidance = 5.0
    """CFG scale; 1 or less turns CFG off, which halves the denoising time."""
    guidance_scale_2: Guidance | None = None
    """CFG scale of the second, low-noise transformer; null: the model has one transformer."""
    audio_guidance_scale: Guidance | None = None
    """CFG scale of the sound, of a model that makes some; null: guidance_scale."""
    negative_prompt: str = ""
    """What CFG steers away from."""
    fps: Fps = 16
    """Frames per second of the written video."""


@dataclass(frozen=True)
class LimitsConfig(Section):
    """The largest request that is admitted. Pools are sized for it."""

    max_pixels: Annotated[Count, at_most(2**32)] = 1280 * 720
    """Height x width of a video, in pixels."""
    max_frames: Annotated[Count, at_most(10**6)] = 121
    """Frames of a video."""
    max_steps: Annotated[Count, at_most(10**6)] = 200
    """Denoising steps."""
    max_prompt_chars: Annotated[Count, at_most(10**7)] = 10_000
    """Characters of the prompt, and of the negative prompt."""
    max_image_pixels: Annotated[Count, at_most(2**32)] = 4096 * 4096
    """Height x width of an input image, or of a frame of an input video, in pixels, before it is resized."""
    max_queued: Annotated[Count, at_most(10**6)] = 256
    """Requests in the queue; past it, `submit` waits or raises Overloaded."""

    def size_rules(self, height: int, width: int, num_frames: int, num_steps: int) -> Iterator[Check]:
        """Yield the rules of a video's size and a request's steps."""
        most = self.max_pixels
        yield "height x width", height * width, height * width <= most, f"must be at most limits.max_pixels={most}"
        most = self.max_frames
        yield "num_frames", num_frames, num_frames <= most, f"must be at most limits.max_frames={most}"
        most = self.max_steps
        yield "num_inference_steps", num_steps, num_steps <= most, f"must be at most limits.max_steps={most}"


@dataclass(frozen=True)
class Config(Section):
    """The stages, and switches of the whole pipeline."""

    speed: Annotated[str, one_of(*SPEEDS)] = "exact"
    """Preset of the speed and memory keys that you leave out, of stages on a GPU: exact (frames of stock diffusers bit
    for bit), fast or smallest. `disagg-ray config` marks what it set; docs/speed.md says what it costs in frames."""
    model: ModelConfig = field(default_factory=ModelConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, in any order: the graph follows from their blocks."""
    share_gpu: list[str] = field(default_factory=list)
    """Stages whose replicas share GPUs: the first replica of each is on one GPU, the second of each on another."""
    gpu_turns: bool = True
    """Make replicas that share a GPU compute one at a time; false: at once, as CUDA (MPS) schedules them."""
    transport: TransportConfig = field(default_factory=TransportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    progress: bool = True
    """Report the steps of each request, over an encrypted port that the driver opens on its node."""
    output: OutputConfig = field(default_factory=OutputConfig)
    fused: bool = False
    """Run the blocks of all stages in one stage, `fused`, with the largest of their resources and the sum of their
    memory. Values that exclude each other are refused."""

    def __post_init__(self) -> None:
        enforce(checks(self), ConfigError)

    def rules(self) -> Iterator[Check]:
        defaults, limits, sigmas, traits = self.defaults, self.limits, self.model.sigmas, self.model.traits
        size, steps = (defaults.height, defaults.width, defaults.num_frames), defaults.num_inference_steps
        for key, value, ok, remedy in shape_rules(traits, *size, steps):
            yield f"defaults.{key}", value, ok, remedy
        ok, remedy = not 0 < len(sigmas) < traits.least_steps, f"must be [] or at least {traits.least_steps} of them"
        yield "model.sigmas", sigmas, ok, remedy
        remedy = f"must be at most limits.max_steps={limits.max_steps}"
        yield "model.sigmas", sigmas, len(sigmas) <= limits.max_steps, remedy
        for key, value, ok, remedy in self.size_rules(*size, steps):
            yield f"defaults.{key}", value, ok, remedy
        yield from cut_rules(self.stages)
        yield from family_rules(self)
        cached = f"is not for model.task={self.model.task}; write {'one of ' * bool(traits.step_caches)}"
        cached += ", ".join(("none", *traits.step_caches))
        for name, stage in self.stages.items():
            method = stage.denoiser.step_cache.method
            ok = method == "none" or method in traits.step_caches
            yield f"stages.{name}.denoiser.step_cache.method", method, ok, cached
            for height, width, num_frames in stage.warm_up:
                for _, value, ok, remedy in shape_rules(traits, height, width, num_frames):
                    yield f"stages.{name}.warm_up", value, ok, remedy
                for _, value, ok, remedy in self.size_rules(height, width, num_frames, 1):
                    yield f"stages.{name}.warm_up", value, ok, remedy
        if not self.fused:
            yield from sharing_rules(self.share_gpu, self.stages)

    def size_rules(self, height: int, width: int, num_frames: int, num_steps: int) -> Iterator[Check]:
        """Yield the rules of a video's size and a request's steps, for the limits and for the ranks that share it."""
        yield from self.limits.size_rules(height, width, num_frames, num_steps)
        yield from token_rules(self.model.traits, self.stages, height, width, num_frames)

    @property
    def max_in_flight(self) -> int:
        """Most requests the driver admits at once: what all replicas together can hold."""
        return sum(REPLICA_WINDOW * stage.most_replicas for stage in self.stages.values())

    @property
    def num_parts(self) -> int:
        """How many blocks share the tiles of a decode; 0: one decodes the whole."""
        return sum(parse_part(block) is not None for stage in self.stages.values() for block in stage.blocks)

    @property
    def encodes_images(self) -> bool:
        """Whether some stage reads the images that a request may do without."""
        return any("vae_encoder" in stage.blocks for stage in self.stages.values())

    def for_group(self, stage: str, group: str) -> Self:
        """Return the configuration as a replica of a stage's group sees it."""
        settings = replace(self.stages[stage].replica_groups[group], groups=self.stages[stage].groups)
        return replace(self, stages=self.stages | {stage: settings})

    def takes_turns(self, stage: str) -> bool:
        """Return whether a stage's replicas compute by turns with those of other processes on their GPU."""
        settings = self.stages[stage]
        return self.gpu_turns and settings.torch_device == "cuda" and settings.num_gpus < 1

    def dtype_of(self, stage: str, component: str) -> str:
        """Return the precision in which a stage holds a component's weights."""
        kind = FAMILIES[self.model.family].components.get(component)
        name = component if kind is None or kind.dtype_of is None else kind.dtype_of
        if component == "vae" and (own := self.stages[stage].vae.dtype) is not None:
            return own
        return self.stages[stage].dtype or str(getattr(self.model.dtype, name, "float32"))

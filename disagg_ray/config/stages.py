"""A stage: its blocks, its replicas and what each of them reserves; and the rules between stages."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Annotated, Self

from disagg_ray.config.options import (
    BLEND,
    TEXT_ENCODER,
    DenoiserConfig,
    Dtype,
    VaeConfig,
    name_parts,
    parse_part,
)
from disagg_ray.config.parallel import ParallelConfig, denoiser_rules
from disagg_ray.config.rules import Bytes, Check, Count, Rule, Section, at_least, at_most, one_of
from disagg_ray.text import did_you_mean, nearest, printable


def _replicas_instead(num_gpus: float) -> str:
    more = f"; write replicas={num_gpus:g} for that many, or parallel" if 1 < num_gpus < math.inf else ""
    return f": a replica computes on one GPU{more}"


NumGpus = Annotated[float, Rule(lambda number: 0 <= number <= 1, "must be from 0 to 1", _replicas_instead)]
MOST_CPUS = 4096
NumCpus = Annotated[float, at_least(0), at_most(MOST_CPUS)]
Replicas = Annotated[Count, at_most(4096)]
RESERVED = {"CPU", "GPU", "memory", "object_store_memory"}
AMOUNT = Rule(lambda n: 0 < n <= 1 or (n > 1 and float(n).is_integer()), "must be a fraction or a whole number")
CUSTOM = Rule(lambda given: not RESERVED & set(given), "must be custom resources; write num_cpus, num_gpus or memory")
Resources = Annotated[dict[str, Annotated[float, AMOUNT, at_most(10**9)]], CUSTOM]
WarmUp = Annotated[
    list[int],
    Rule(lambda size: len(size) == 3 and min(size) > 0, "must be [height, width, num_frames]"),
]


@dataclass(frozen=True)
class GroupConfig(Section):
    """Replicas of a stage on one kind of hardware. A key that is null has the stage's value."""

    replicas: Replicas = 1
    """Actors of this group."""
    accelerator_type: str | None = None
    """GPU model, as for the stage."""
    num_gpus: NumGpus | None = None
    """GPUs of each replica, from 0 to 1."""
    num_cpus: NumCpus | None = None
    """CPUs of each replica."""
    memory: Bytes | None = None
    """Host memory of each replica, in bytes."""
    resources: Resources | None = None
    """Custom Ray resources of each replica."""
    label_selector: dict[str, str] | None = None
    """Labels that a replica's node must have."""
    parallel: ParallelConfig | None = None
    """The ranks of each replica, in place of all of the stage's `parallel`."""


@dataclass(frozen=True)
class StageConfig(Section):
    """A part of the model, and the replicas that run it."""

    blocks: list[str] = field(default_factory=list)
    """Top-level blocks of the checkpoint's diffusers modular pipeline, in order. Several stages may share the tiles of
    `decode`, as `decode.1of2` and `decode.2of2`; one more, `blend`, makes the video of them."""
    replicas: Replicas = 1
    """Actors of this stage. A service (`disagg-ray up`) also takes {min: A, max: B} and scales with the load."""
    min_replicas: int | None = None
    """The min of {min, max}; null: `replicas`."""
    max_replicas: Replicas | None = None
    """The max of {min, max}, for which pools are sized; null: `replicas`."""
    num_gpus: NumGpus = 0.0
    """GPUs of each replica, or of each of its ranks, from 0 to 1; a fraction shares one."""
    num_cpus: NumCpus = 1.0
    """CPUs that Ray reserves for each replica."""
    memory: Bytes | None = None
    """Host memory that Ray reserves for each replica, in bytes; null: none."""
    resources: Resources = field(default_factory=dict)
    """Custom Ray resources of each replica, by name."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a replica's node must have, as `ray.io/accelerator-type: H100`, `zone: "!b"` or
    `disk: in(ssd,nvme)`."""
    accelerator_type: str | None = None
    """GPU model of each replica by Ray's name, as H200 or L40S; null: any."""
    placement: Annotated[str, one_of("pack", "spread")] = "pack"
    """pack (fill nodes that are in use first) or spread (use as many nodes as possible; not with share_gpu)."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Replicas on mixed hardware, by a name of your choice, in place of `replicas`."""
    num_threads: Annotated[Count, at_most(MOST_CPUS)] | None = None
    """Torch threads of each replica; null: num_cpus, rounded up. Frames are bit-identical only for equal numbers."""
    dtype: Dtype | None = None
    """Precision of all components of this stage; null: model.dtype."""
    device: Annotated[str, one_of("auto", "cpu", "cuda")] = "auto"
    """auto (cuda if num_gpus is over 0, else cpu), cpu or cuda."""
    max_vram_bytes: Bytes | None = None
    """VRAM limit of each replica's torch, in bytes: an allocation over it fails in that replica alone. null: none. For
    stages on a GPU only."""
    cache_bytes: Annotated[int, at_least(0)] = 64 * 2**20
    """Prompt cache, in bytes of the replica's pool: keeps the embeddings of recent prompts; they are evicted when
    outputs need the memory. 0: off. For the stage with the block text_encoder."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """How its transformers run."""
    vae: VaeConfig = field(default_factory=VaeConfig)
    """How its VAE runs."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The ranks of each replica, each with the stage's num_gpus, num_cpus, memory and resources."""
    offload: Annotated[str, one_of("none", "group", "model")] = "none"
    """Weights in host memory, to save VRAM at the cost of time: none, group (all but the layers at work) or model (all
    but the component at work). For stages on a GPU only."""
    warm_up: list[WarmUp] = field(default_factory=list)
    """Sizes [height, width, num_frames] to run at start, so that no request of that size waits for compilation and
    timing. Makes starting longer."""

    def rules(self) -> Iterator[Check]:
        yield from self._replica_rules()
        on_gpu = any(group.torch_device == "cuda" for group in self.replica_groups.values())
        on_cpu = ": the stage runs on the CPU; give it num_gpus, or leave this out"
        most = self.max_vram_bytes
        yield "max_vram_bytes", most, most is None or on_gpu, f"must be null{on_cpu}"
        yield "offload", self.offload, self.offload == "none" or on_gpu, f"must be none{on_cpu}"
        tunes = self.vae.autotune
        yield "vae.autotune", tunes, on_gpu or not tunes, f"must be false{on_cpu}"
        ok = self.cache_bytes in (0, type(self).cache_bytes) or TEXT_ENCODER in self.blocks
        remedy = f"must be left out: it is for the stage with the block {TEXT_ENCODER}"
        yield "cache_bytes", self.cache_bytes, ok, remedy
        quantization = self.denoiser.quantization
        ok = quantization != "fp8" or self.offload == "none"
        yield "denoiser.quantization", quantization, ok, "goes with neither offload nor loras; write fp8_storage"

    def _replica_rules(self) -> Iterator[Check]:
        least, most = self.min_replicas, self.max_replicas
        if (least, most) != (None, None):
            bounds = {"min": least, "max": most}
            ok = least is not None and most is not None and 1 <= least <= self.replicas <= most
            yield "replicas", bounds, ok, "must be both, with 1 <= min <= max"
            yield "replicas", bounds, not self.groups, "must be a number: groups of replicas cannot be scaled"
        for name, group in self.replica_groups.items():
            key = f"groups.{name}.accelerator_type" if name else "accelerator_type"
            ok = group.accelerator_type is None or group.num_gpus > 0
            yield key, group.accelerator_type, ok, "must be null, or give the stage num_gpus"
            yield from _gang_rules(f"groups.{name}.parallel" if name else "parallel", group)

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
    def replica_groups(self) -> dict[str, Self]:
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


def _gang_rules(key: str, stage: StageConfig) -> Iterator[Check]:
    """Yield the rules of replicas of several ranks."""
    parallel, blocks = stage.parallel, list(stage.blocks)
    sizes = {name: getattr(parallel, name) for name in ("cfg", "ulysses", "ring", "rows")}
    alone = not parallel.is_gang
    remedy = "must be left out: only a stage of the block denoise alone can be split over ranks so; see rows for decode"
    yield key, sizes, parallel.cfg * parallel.num_shards == 1 or blocks == ["denoise"], remedy
    remedy = "must be 1: only a stage of the block decode alone has rows to share"
    yield f"{key}.rows", parallel.rows, parallel.rows == 1 or blocks == ["decode"], remedy
    remedy = "must be null with parallel.rows, which takes the place of tiles"
    tile = stage.vae.tile_pixels
    yield f"{key.removesuffix('parallel')}vae.tile_pixels", tile, tile is None or parallel.rows == 1, remedy
    remedy = f"must be left out with num_gpus={stage.num_gpus:g}: no two ranks may share a GPU; write more than 0.5"
    yield key, sizes, alone or stage.torch_device == "cpu" or stage.num_gpus > 0.5, remedy
    has_place = stage.num_gpus > 0 or stage.num_cpus > 0
    yield key, sizes, alone or has_place, "must be left out: ranks that reserve nothing; write num_cpus or num_gpus"
    remedy = f"must be left out with offload={stage.offload}: each rank would keep a copy on its host; write none"
    yield key, sizes, alone or stage.offload == "none", remedy
    yield from denoiser_rules(stage.parallel, stage.denoiser)
    remedy = "must be left out with placement=spread; write parallel.spread for ranks on several nodes"
    yield key, sizes, alone or stage.placement == "pack", remedy


def cut_rules(stages: Mapping[str, StageConfig]) -> Iterator[Check]:
    """Yield the rules of the model's cut into stages: their names, and a decode in parts."""
    yield "stages", sorted(stages), bool(stages), "must be at least one stage"
    for name, stage in stages.items():
        ok = name.isascii() and name.isidentifier() and name.islower()
        yield f"stages.{name}", name, ok, "must be a name of lower-case letters, digits and _"
        near = nearest(name, stages.keys() - {name})
        hint = f"; did you mean the stage {printable(near)}?" if near is not None else ""
        yield f"stages.{name}.blocks", stage.blocks, bool(stage.blocks), f"must name at least one block{hint}"
    blocks = (block for stage in stages.values() for block in stage.blocks)
    found = sorted(block for block in blocks if block.split(".")[0] in ("decode", BLEND))
    if set(found) <= {"decode"}:
        return  # the graph checks how many there are
    num_parts = max([2, *(part[1] for block in found if (part := parse_part(block)))])
    parts = name_parts(num_parts)
    remedy = f"must be decode alone, or {', '.join(parts)} and {BLEND}, each once"
    yield "stages", found, found == sorted([*parts, BLEND]), remedy
    for name, stage in stages.items():
        num_own = len(set(parts) & set(stage.blocks))
        ok = BLEND not in stage.blocks or num_own in (0, num_parts)
        remedy = f"{BLEND} waits for all parts and must have a stage of its own"
        yield f"stages.{name}.blocks", stage.blocks, ok, remedy
        ok = stage.vae.tile_pixels is None or not num_own or "vae_encoder" in stage.blocks
        remedy = "must be left out: a decode in parts always works in tiles"
        yield f"stages.{name}.vae.tile_pixels", stage.vae.tile_pixels, ok, remedy


def sharing_rules(names: list[str], stages: Mapping[str, StageConfig]) -> Iterator[Check]:
    """Yield the rules of stages whose replicas share GPUs."""
    yield "share_gpu", names, len(set(names)) == len(names) != 1, "must name two stages or more, each once"
    unknown = next((name for name in names if name not in stages), None)
    remedy = f"must be of the stages {', '.join(stages)}{did_you_mean(unknown or '', stages)}"
    yield "share_gpu", names, unknown is None, remedy
    sharing = {name: stages[name] for name in names}
    for name, stage in sharing.items():
        yield "share_gpu", names, not stage.groups, f"must leave {name} out: a stage with groups cannot share"
        fixed = stage.max_replicas is None
        yield "share_gpu", names, fixed, f"must leave {name} out: its replicas are {{min, max}}; write a number there"
        alone = not stage.parallel.is_gang
        yield "share_gpu", names, alone, f"must leave {name} out: its ranks have GPUs of their own (parallel)"
        remedy = "must be pack: replicas of stages in share_gpu are placed together, on one GPU"
        yield f"stages.{name}.placement", stage.placement, stage.placement == "pack", remedy
    numbers = ", ".join(f"{name} {stage.replicas}" for name, stage in sharing.items())
    ok = len({stage.replicas for stage in sharing.values()}) <= 1
    yield "share_gpu", names, ok, f"must have the same number of replicas each; they have {numbers}"
    gpus = sum(stage.num_gpus for stage in sharing.values())
    remedy = f"their num_gpus add up to {gpus:g} and must be at most 1; lower them or write []"
    yield "share_gpu", names, gpus <= 1, remedy
    for (one, first), (other, second) in combinations(sharing.items(), 2):
        remedy = f"must be as stages.{one}, whose GPU it shares: "
        kind, wanted = second.accelerator_type, first.accelerator_type
        yield f"stages.{other}.accelerator_type", kind, None in (kind, wanted) or kind == wanted, f"{remedy}{wanted}"
        for label in first.label_selector.keys() & second.label_selector.keys():
            value, wanted = second.label_selector[label], first.label_selector[label]
            yield f"stages.{other}.label_selector.{label}", value, value == wanted, f"{remedy}{wanted}"

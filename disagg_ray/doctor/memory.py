"""Compares the memory that the stages need with that of GPUs and hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.doctor.check import Check, fail, fail_unless, ok, skipped, warn_unless
from disagg_ray.doctor.software import Gpu
from disagg_ray.errors import InputError
from disagg_ray.graph import FRAMES, build_graph
from disagg_ray.replica.sizing import MAX_VIDEOS, driver_pool_bytes, frame_bytes, pool_bytes
from disagg_ray.replica.stage import Stage
from disagg_ray.text import human_bytes


@dataclass(frozen=True)
class Need:
    """Memory of one replica of a stage, without its kernels' working memory."""

    stage: str
    replicas: int
    num_gpus: float
    """Of groups, the least that one on GPUs has."""
    on_gpu: bool
    weight_bytes: int | None
    """None: the weights are not on this machine yet."""
    pool_bytes: int
    video_bytes: int = 0
    """Host memory of decoded videos until they are fetched."""
    num_ranks: int = 1
    """Of each replica, each with the weights; the first one has the pool."""

    @property
    def nbytes(self) -> int:
        return (self.weight_bytes or 0) + self.pool_bytes

    @property
    def host_bytes(self) -> int:
        """Of host memory; a pool on a GPU has a copy there."""
        weights = 0 if self.on_gpu else self.num_ranks * (self.weight_bytes or 0)
        return self.video_bytes + self.pool_bytes + weights

    def __str__(self) -> str:
        weights = "weights not here yet" if self.weight_bytes is None else f"weights {human_bytes(self.weight_bytes)}"
        videos = f", decoded videos on the host {human_bytes(self.video_bytes)}" if self.video_bytes else ""
        ranks = f" at each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"{self.stage}: {weights}{ranks}, pool {human_bytes(self.pool_bytes)}{videos}"


@dataclass(frozen=True)
class Needs:
    stages: tuple[Need, ...]
    driver_bytes: int


def measure(config: Config) -> Needs:
    """Measure the stages of a configuration without a GPU and without loading weights.

    Raises:
        InputError: model and stages do not work together, or a pool is too small.
    """
    on_cpu = replace(config, stages={name: without_gpu(stage) for name, stage in config.stages.items()})
    stages = {name: Stage(name, on_cpu) for name in config.stages}
    graph = build_graph([stage.ports for stage in stages.values()])
    for stage in stages.values():
        stage.connect(graph)
    geometry = next(iter(stages.values())).geometry
    needs = tuple(_need(config, stage) for stage in stages.values())
    return Needs(needs, driver_pool_bytes(config, graph, geometry))


def without_gpu(stage: StageConfig) -> StageConfig:
    """Return the configuration of a stage for a machine without a GPU."""
    return replace(stage, device="cpu", max_vram_bytes=None, offload="none", vae=replace(stage.vae, autotune=False))


def _need(config: Config, stage: Stage) -> Need:
    settings, limits = config.stages[stage.name], config.limits
    pool, video = pool_bytes(config, stage), limits.max_frames * frame_bytes(limits.max_pixels)
    num_videos = MAX_VIDEOS + 1 if FRAMES in stage.ports.outputs else 0  # those that wait, and one that is copied
    groups = settings.replica_groups.values()
    num_gpus = [group.num_gpus for group in groups if group.torch_device == "cuda"]
    num_ranks, weights = max(group.parallel.size for group in groups), stage.weight_bytes()
    return Need(
        stage.name, settings.num_replicas, min(num_gpus, default=0.0), bool(num_gpus), weights, pool,
        num_videos * video, num_ranks,
    )  # fmt: skip


def check_model(config: Config) -> tuple[list[Check], Needs | None]:
    """Measure what a configuration needs, or say why it does not work."""
    try:
        needs = measure(config)
    except InputError as error:
        key = str(error).partition(":")[0]
        return [fail("model", str(error), f"correct {key} in the configuration")], None
    return [ok("model", f"{config.model.path}: {' -> '.join(need.stage for need in needs.stages)}")], needs


def check_gpu_memory(needs: Needs, gpus: Sequence[Gpu]) -> Iterator[Check]:
    """Compare each stage on a GPU with the largest GPU and with its share of it."""
    largest = max((gpu.total_bytes for gpu in gpus), default=0)
    for need in (need for need in needs.stages if need.on_gpu):
        share, key = largest * min(1.0, need.num_gpus), f"stages.{need.stage}"
        if not largest:
            yield skipped("gpu memory", f"{need}; no GPU to compare with was found")
        elif need.nbytes > largest:
            yield fail(
                "gpu memory", f"{need}; the largest GPU has {human_bytes(largest)}",
                f"lower limits.max_pixels or limits.max_frames, set {key}.dtype=bfloat16, or use a larger GPU",
            )  # fmt: skip
        else:
            yield warn_unless(
                need.nbytes <= share, "gpu memory", f"{need}; {need.num_gpus:g} of a GPU is {human_bytes(share)}",
                f"raise {key}.num_gpus, so that no other stage is put on the same GPU",
            )  # fmt: skip


def check_host_memory(needs: Needs, host_bytes: int) -> Check:
    """Compare the memory of all hosts with what stages, copies of GPU pools and the driver take of it."""
    asked = needs.driver_bytes + sum(need.replicas * need.host_bytes for need in needs.stages)
    on_cpu = "; ".join(str(need) for need in needs.stages if not need.on_gpu)
    detail = f"{human_bytes(asked)} of {human_bytes(host_bytes)}" + (f": {on_cpu}" if on_cpu else "")
    remedy = "lower limits.max_frames or limits.max_pixels, or use fewer replicas"
    return fail_unless(asked <= 0.9 * host_bytes, "host memory", detail, remedy)

"""Where replicas run: launching their actors in Ray, and what room the cluster has for more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.driver import names
from disagg_ray.driver.calls import GROUPS, Actor, ReplicaId
from disagg_ray.driver.cluster import DIGITS, add_up, resources_of
from disagg_ray.replica.served import ServedReplica

STRATEGIES = {"pack": "DEFAULT", "spread": "SPREAD"}
"""Ray's names: its default fills nodes that are in use first, up to half."""

MANY = 1_000

EXACT = re.compile(r"[\w.-]*")
"""A label's value, and none of Ray's other conditions."""


def settings_of(config: Config, replica: ReplicaId) -> StageConfig:
    """Return what a replica's actor is launched with."""
    return without_count(config.stages[replica.stage].replica_groups[replica.group])


def without_count(settings: StageConfig) -> StageConfig:
    """Return a stage's settings without how many replicas it has."""
    return replace(settings, replicas=1, min_replicas=None, max_replicas=None, groups={})


@cache
def _actor_class(replica_class: type, stage: str) -> Any:
    """Return Ray's class of a stage's actors, which the dashboard lists under the stage's name."""
    remote: Any = ray.remote
    return remote(concurrency_groups=GROUPS)(type(stage.capitalize(), (replica_class,), {}))


class Placement:
    """Launches actors where the configuration wants them; detached ones, a service's, outlive this process."""

    def __init__(self, pipeline_id: str, *, detached: bool = False) -> None:
        self._pipeline_id, self._detached = pipeline_id, detached
        self._shared: list[PlacementGroup] = []

    def reserve(self, config: Config) -> None:
        """Reserve the GPUs that stages share, before any actor is launched. Waits for Ray, as `launch` does."""
        if config.share_gpu:
            self._shared.extend(self._reserve_each(config))

    def _reserve_each(self, config: Config) -> Iterator[PlacementGroup]:
        """Yield the placement group of each shared GPU; a service's may exist already."""
        found = names.find_groups(self._pipeline_id) if self._detached else {}
        sharing = [config.stages[name] for name in config.share_gpu]
        for index in range(sharing[0].replicas):
            name = names.group_name(self._pipeline_id, index)
            options = {"name": name, "lifetime": "detached"} if self._detached else {}
            yield found.get(name) or _reserve(sharing, 1, **options)

    def launch(self, config: Config, replica: ReplicaId, incarnation: int = 0) -> Actor:
        """Create an actor for a replica; it starts once there is room for it."""
        if self._detached:
            name = names.replica_name(self._pipeline_id, replica, incarnation)
            options = {"name": name, "namespace": names.NAMESPACE, "lifetime": "detached"}
        else:
            name = f"disagg_ray-{self._pipeline_id}-{replica.name}" + (f".{incarnation}" if incarnation else "")
            options = {"name": name}
        settings = settings_of(config, replica)
        lives = {"lifetime": "detached"} if self._detached else {}
        bundles = reserve_ranks(settings, name=name, **lives) if settings.parallel.is_gang else None
        try:
            placed = self.options(config, replica) | _in_bundle(bundles)
            actor_class = _actor_class(ServedReplica, replica.stage).options(**placed, **options)
            handle = actor_class.remote(replica.stage, replica.index, config.for_group(replica.stage, replica.group))
        except BaseException:
            if bundles is not None:  # no actor owns them
                remove_placement_group(bundles)
            raise
        return Actor(replica, incarnation, handle, settings, bundles=bundles)

    def options(self, config: Config, replica: ReplicaId) -> dict[str, Any]:
        """Return Ray's options for a replica's actor."""
        settings = settings_of(config, replica)
        options: dict[str, Any] = {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": dict(settings.resources),
            "max_restarts": 0,  # the fleet launches a new actor: calls to the old one can never reach it
            "max_task_retries": 0,  # a retry by Ray would run against memory that is gone
            "scheduling_strategy": STRATEGIES[settings.placement],
        }
        if settings.memory is not None:
            options["memory"] = settings.memory
        if settings.accelerator_type is not None:
            options["accelerator_type"] = settings.accelerator_type
        if replica.stage in config.share_gpu:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._shared[replica.index], 0)
        elif settings.label_selector:
            options["label_selector"] = dict(settings.label_selector)
        return options

    def close(self) -> None:
        """Give the shared GPUs back."""
        for group in self._shared:
            remove_placement_group(group)
        self._shared = []


def _in_bundle(bundles: PlacementGroup | None) -> dict[str, Any]:
    """Return the options of an actor that is rank 0 of a gang, which do without what its bundle has already."""
    if bundles is None:
        return {}
    strategy = PlacementGroupSchedulingStrategy(bundles, 0)
    return {"scheduling_strategy": strategy, "label_selector": None, "accelerator_type": None}


def reserve_ranks(settings: StageConfig, **options: str) -> PlacementGroup:
    """Reserve a bundle for each rank of a replica; of a replica, `Actor.kill` removes them."""
    strategy = "PACK" if settings.parallel.spread else "STRICT_PACK"
    return _reserve([settings], settings.parallel.size, strategy=strategy, **options)


def _reserve(sharing: Sequence[StageConfig], count: int, **options: str) -> PlacementGroup:
    """Reserve equal bundles, each for one process of each of some stages."""
    labels: dict[str, str] = {}
    for stage in sharing:
        labels |= stage.label_selector
        if stage.accelerator_type is not None:
            labels["ray.io/accelerator-type"] = stage.accelerator_type
    total = add_up((1, resources_of(stage)) for stage in sharing)
    bundle = {name: number for name, number in total.items() if number}
    selector = [labels] * count if labels else None
    group: PlacementGroup = placement_group([bundle] * count, bundle_label_selector=selector, **options)
    return group


def room_for(config: Config, stage: str) -> int:
    """Return how many more replicas of a stage the cluster can take now, as if it were one node."""
    free = ray.available_resources()
    settings = config.stages[stage]
    needed = {k: n * settings.parallel.size for k, n in resources_of(settings).items() if n}
    return min((int(round(free.get(name, 0) / number, DIGITS)) for name, number in needed.items()), default=MANY)


def has_room(config: Config, replica: ReplicaId) -> bool:
    """Return whether some node has room for one more replica, or the cluster grows; ranks may `spread` over nodes."""
    if replica.stage in config.share_gpu or config.service.cluster_grows:
        return replica.stage not in config.share_gpu
    settings = settings_of(config, replica)
    needed = {name: number for name, number in resources_of(settings).items() if number}
    if settings.accelerator_type is not None:
        needed[f"accelerator_type:{settings.accelerator_type}"] = 0.001
    exact = {key: value for key, value in settings.label_selector.items() if EXACT.fullmatch(value)}
    labels = {node["NodeID"]: node.get("Labels", {}) for node in ray.nodes()}
    rooms = [
        min((int(round(free.get(name, 0) / number, DIGITS)) for name, number in needed.items()), default=MANY)
        for node, free in available_resources_per_node().items()
        if exact.items() <= labels.get(node, {}).items()
    ]
    parallel = settings.parallel
    return (sum(rooms) if parallel.spread else max(rooms, default=0)) >= parallel.size

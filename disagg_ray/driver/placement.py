"""Where replicas run: the cluster, the actors, and waiting that can be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.driver import names
from disagg_ray.driver.calls import GROUPS, Actor, Post
from disagg_ray.driver.cluster import DIGITS, add_up, resources_of
from disagg_ray.replica.actor import ServedReplica

STRATEGIES = {"pack": "DEFAULT", "spread": "SPREAD"}
"""Ray's names: its default fills nodes that are in use first, up to half."""

MANY = 1_000

EXACT = re.compile(r"[\w.-]*")
"""A label's value, and none of Ray's other conditions."""


def posts_of(config: Config) -> list[Post]:
    """Return a deployment's places, stage by stage."""
    return [
        Post(stage, index, group)
        for stage, settings in config.stages.items()
        for index, group in enumerate(
            name for name, group in settings.replica_groups.items() for _ in range(group.replicas)
        )
    ]


class Placement:
    """Puts actors where the configuration wants them; those of a service outlive their driver."""

    def __init__(self, config: Config, pipeline_id: str, *, standing: bool = False) -> None:
        self.config = config
        self._pipeline_id, self._standing = pipeline_id, standing
        self._shared: list[PlacementGroup] = []

    def reserve(self) -> None:
        """Reserve the GPUs that stages share; before any actor is launched. As `launch`, it waits for Ray."""
        if self.config.share_gpu:
            self._shared.extend(self._share())

    def _share(self) -> Iterator[PlacementGroup]:
        """Yield what each GPU is reserved with that stages share; a service's may be there already."""
        found = names.find_groups(self._pipeline_id) if self._standing else {}
        for index in range(self.config.stages[self.config.share_gpu[0]].replicas):
            name = names.group_name(self._pipeline_id, index)
            kept = {"name": name, "lifetime": "detached"} if self._standing else {}
            yield found.get(name) or reserve_shared(self.config, **kept)

    def posts(self) -> list[Post]:
        """Return the deployment's places, stage by stage."""
        return posts_of(self.config)

    def launch(self, post: Post, incarnation: int = 0, config: Config | None = None) -> Actor:
        """Create an actor for a post, by another configuration if one is given; it starts once there is room for it."""
        config = (config or self.config).for_group(post.stage, post.group)
        actor_class: Any = ray.remote(**self.options(post, config.stages[post.stage]))(
            type(post.stage.capitalize(), (ServedReplica,), {})
        )
        if self._standing:
            name = names.replica_name(self._pipeline_id, post.name, incarnation)
            options = {"name": name, "namespace": names.NAMESPACE, "lifetime": "detached"}
        else:
            name = f"disagg_ray-{self._pipeline_id}-{post.name}" + (f".{incarnation}" if incarnation else "")
            options = {"name": name}
        return Actor(post, incarnation, actor_class.options(**options).remote(post.stage, post.index, config))

    def room_for(self, stage: str) -> int:
        """Return how many more replicas of a stage the cluster can take now; nodes are taken for one."""
        free = ray.available_resources()
        asked = {name: number for name, number in resources_of(self.config.stages[stage]).items() if number}
        return min((int(round(free.get(name, 0) / number, DIGITS)) for name, number in asked.items()), default=MANY)

    def has_room(self, post: Post, config: Config) -> bool:
        """Return whether some node has room for one more replica at a post, or one that has is to come."""
        if post.stage in config.share_gpu or config.service.cluster_grows:
            return post.stage not in config.share_gpu
        settings = config.for_group(post.stage, post.group).stages[post.stage]
        asked = {name: number for name, number in resources_of(settings).items() if number}
        if settings.accelerator_type is not None:
            asked[f"accelerator_type:{settings.accelerator_type}"] = 0.001
        exact = {key: value for key, value in settings.label_selector.items() if EXACT.fullmatch(value)}
        labels = {node["NodeID"]: node.get("Labels", {}) for node in ray.nodes()}
        return any(
            all(round(free.get(name, 0) - number, DIGITS) >= 0 for name, number in asked.items())
            for node, free in available_resources_per_node().items()
            if exact.items() <= labels.get(node, {}).items()
        )

    def options(self, post: Post, settings: StageConfig) -> dict[str, Any]:
        """Return what Ray is asked for a post's actor."""
        options: dict[str, Any] = {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": dict(settings.resources),
            "max_restarts": 0,  # a new actor takes the post: calls meant for the old one can never reach it
            "max_task_retries": 0,  # a retry by Ray would run against memory that is gone
            "concurrency_groups": GROUPS,
            "scheduling_strategy": STRATEGIES[settings.placement],
        }
        if settings.memory is not None:
            options["memory"] = settings.memory
        if settings.accelerator_type is not None:
            options["accelerator_type"] = settings.accelerator_type
        if post.stage in self.config.share_gpu:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._shared[post.index], 0)
        elif settings.label_selector:
            options["label_selector"] = dict(settings.label_selector)
        return options

    def close(self) -> None:
        """Give the shared GPUs back."""
        for group in self._shared:
            remove_placement_group(group)
        self._shared = []


def living(name: str) -> list[Actor]:
    """Return a service's actors, whoever launched them; their posts' groups are not known."""
    found = names.find_replicas(name)
    return [Actor(Post(who.stage, who.index, ""), who.incarnation, handle) for who, handle in found.items()]


def reserve_shared(config: Config, **options: str) -> PlacementGroup:
    """Reserve one bundle for a replica of each stage that shares a GPU."""
    sharing = [config.stages[name] for name in config.share_gpu]
    labels: dict[str, str] = {}
    for stage in sharing:
        labels |= stage.label_selector
        if stage.accelerator_type is not None:
            labels["ray.io/accelerator-type"] = stage.accelerator_type
    asked = add_up((1, resources_of(stage)) for stage in sharing)
    bundle = {name: number for name, number in asked.items() if number}
    selector = [labels] if labels else None
    group: PlacementGroup = placement_group([bundle], bundle_label_selector=selector, **options)
    return group

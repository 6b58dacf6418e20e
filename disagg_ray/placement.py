"""Where replicas run: the cluster, the actors, and waiting that can be seen."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from disagg_ray import environment, roster
from disagg_ray.address import LOCAL, STATUS, find_cluster
from disagg_ray.config import Config, StageConfig, check_joining
from disagg_ray.errors import ConfigError, DisaggError, ReplicaLost, StageError, StartError
from disagg_ray.preflight import check_model, check_temporary_folder
from disagg_ray.replica import ServedReplica
from disagg_ray.software import PACKAGE, is_installed
from disagg_ray.threads import off_loop
from disagg_ray.units import mask, printable, shown
from disagg_ray.version import VERSION

logger = logging.getLogger("disagg_ray")

GROUPS = {"compute": 1, "pull": 2, "encode": 1, "control": 2}
"""Threads of each kind in a replica."""
GROUP_OF = {"run": "compute", "load": "compute", "prefetch": "pull", "encode": "encode"}
"""Every other call is a control call."""
STRATEGIES = {"pack": "DEFAULT", "spread": "SPREAD"}
"""Ray's names: its default fills nodes that are in use first, up to half."""
MANY = 1_000
EXACT = re.compile(r"[\w.-]*")
"""A label's value, and none of Ray's other conditions."""
DIGITS = 4
"""After the point, in Ray's numbers of resources: 7 x 0.1 + 7 x 0.8 + 7 x 0.1 GPUs are 7."""
AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before a replica that cannot be reached is asked again; after the last it is lost."""
NOTICE_S = 10.0
"""How often a wait says what it waits for."""


@dataclass(frozen=True)
class Post:
    """A place in the deployment, which one actor after another may hold."""

    stage: str
    index: int
    group: str

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.index}"


@dataclass(frozen=True)
class Actor:
    """A launched replica."""

    post: Post
    incarnation: int
    """How many held the post before."""
    handle: ActorHandle[Any]

    @property
    def stage(self) -> str:
        return self.post.stage

    @property
    def name(self) -> str:
        return self.post.name

    @property
    def id(self) -> str:
        """Tells the actors of a post apart."""
        return f"{self.name}.{self.incarnation}"

    def call(self, method: str, *args: Any) -> Awaitable[Any]:
        """Call a method, under a title for Ray's dashboard.

        Titles name no request: Ray keeps each for good, tens of kilobytes of the driver's and a series of its metrics.
        """
        if not ray.is_initialized():  # Ray would start a cluster
            raise ReplicaLost(f"{self.name}: the cluster was left")
        title = f"{self.name} {method}"
        bound = getattr(self.handle, method)
        return bound.options(name=title, concurrency_group=GROUP_OF.get(method, "control")).remote(*args)  # type: ignore[no-any-return]


def join(address: str | None) -> None:
    """Join the Ray cluster at an address, or the one that RAY_ADDRESS or this machine knows, unless one is joined.

    Raises:
        ConfigError: it is no address of a cluster.
        StartError: there is none, or it does not let this machine in within seconds.
    """
    if ray.is_initialized():
        return
    found = find_cluster(address)
    try:
        ray.init(address=found, job_config=_job({}), logging_level=logging.ERROR)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError) as error:
        reason = printable(str(error.__cause__ or error).strip())
        raise StartError(f"cluster.address: '{found}' cannot be joined: {reason}; {STATUS}") from error


class Cluster:
    """A Ray cluster that was joined, or started and then shut down again."""

    def __init__(self, config: Config) -> None:
        self._started = False
        self._auth_mode = environment.ray_auth_mode()
        address = config.cluster.address or environment.ray_address() or LOCAL
        check_model(config, whole=address == LOCAL and not ray.is_initialized())
        if ray.is_initialized():
            check_joining(config.cluster, "this process")
            return
        if address != LOCAL:
            check_joining(config.cluster, address)
            join(config.cluster.address)
        else:
            self._start(config)

    def _start(self, config: Config) -> None:
        """Start one on this machine, reachable with a token only."""
        check_temporary_folder()
        _make_token()
        ray.init(address="local", logging_level=logging.ERROR, **own_cluster(config))
        self._started = True
        try:
            _check_gpus(config, ray.cluster_resources().get("GPU", 0))
        except DisaggError:
            self.close()
            raise

    @property
    def is_own(self) -> bool:
        """Whether it was started here, so that all of it is on this machine."""
        return self._started

    def close(self) -> None:
        if self._started:
            ray.shutdown()
            environment.replace("RAY_AUTH_MODE", self._auth_mode)
            self._started = False


def own_cluster(config: Config) -> dict[str, Any]:
    """Return what a cluster of our own is started with."""
    asked = total_resources(config.stages)
    return {
        "num_cpus": max(psutil.cpu_count() or 1, int(asked["CPU"]) + 1),  # bookkeeping: let the stages share cores
        "num_gpus": config.cluster.num_gpus,
        "resources": {name: number for name, number in asked.items() if name not in ("CPU", "GPU", "memory")},
        "include_dashboard": config.cluster.dashboard,
        "job_config": _job(_metadata(config)),
    }


def _job(metadata: dict[str, str]) -> JobConfig:
    """Describe a job whose workers look for modules where any Python of their node does.

    Ray would put the working folder first, so that a `numpy.py` or another version of this package there was taken; it
    does not for jobs that it believes to come by Ray Client. A package that is not installed is taken from its folder.
    """
    if environment.in_ray_job():
        return JobConfig(metadata=metadata)  # the job's own working folder is part of it
    folders = [] if is_installed() else [str(PACKAGE.parent)]
    return JobConfig(metadata=metadata, _client_job=True, _py_driver_sys_path=folders)


def _metadata(config: Config) -> dict[str, str]:
    """Return what a stranger should see of the job in Ray's dashboard."""
    stages = ", ".join(f"{name} x {stage.num_replicas}" for name, stage in config.stages.items())
    return {"disagg_ray": VERSION, "model": mask(config.model.path), "stages": stages}


def total_resources(stages: Mapping[str, StageConfig]) -> dict[str, float]:
    """Return what all replicas together ask of a cluster, by Ray's names."""
    groups = [group for stage in stages.values() for group in stage.replica_groups.values()]
    return {"CPU": 0, "GPU": 0} | _add_up((group.replicas, _resources(group)) for group in groups)


def _add_up(asked: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Return the sum of resources, each taken so many times."""
    total: dict[str, float] = {}
    for count, resources in asked:
        for name, number in resources.items():
            total[name] = total.get(name, 0) + count * number
    return {name: round(number, DIGITS) for name, number in total.items()}


def _resources(settings: StageConfig) -> dict[str, float]:
    """Return what one replica asks for, by Ray's names."""
    memory = {"memory": float(settings.memory)} if settings.memory is not None else {}
    return {"CPU": settings.num_cpus, "GPU": settings.num_gpus} | memory | settings.resources


def _check_gpus(config: Config, available: float) -> None:
    asked = total_resources(config.stages)["GPU"]
    if asked > available:
        by_stage = ", ".join(
            f"{name} {group.replicas} x {group.num_gpus:g}"
            for name, stage in config.stages.items()
            for group in stage.replica_groups.values()
        )
        raise ConfigError(
            f"stages.*.num_gpus: {asked:g} GPUs are asked for ({by_stage}) and this machine has {available:g}; "
            f"lower num_gpus or replicas, or join a cluster with cluster.address"
        )


def _make_token() -> None:
    """Write Ray's token so that only its owner can read it; Ray itself would leave it open to all users."""
    path = environment.ray_token_path()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise ConfigError(
            f"HOME: Ray's token {shown(str(path))} cannot be written: {error.strerror}; set HOME to a folder that can "
            f"be written to, or RAY_AUTH_TOKEN_PATH to a file of your own"
        ) from error


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
    """Puts actors where the configuration wants them; those of a standing pipeline outlive their driver."""

    def __init__(self, config: Config, pipeline_id: str, *, standing: bool = False) -> None:
        self.config = config
        self._pipeline_id, self._standing = pipeline_id, standing
        self._shared: list[PlacementGroup] = []

    def reserve(self) -> None:
        """Reserve the GPUs that stages share; before any actor is launched. As `launch`, it waits for Ray."""
        if self.config.share_gpu:
            self._shared.extend(self._share())

    def _share(self) -> Iterator[PlacementGroup]:
        """Yield what each GPU is reserved with that stages share; a standing pipeline's may be there already."""
        found = roster.find_groups(self._pipeline_id) if self._standing else {}
        for index in range(self.config.stages[self.config.share_gpu[0]].replicas):
            name = roster.group_name(self._pipeline_id, index)
            kept = {"name": name, "lifetime": "detached"} if self._standing else {}
            yield found.get(name) or _share(self.config, **kept)

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
            name = roster.replica_name(self._pipeline_id, post.name, incarnation)
            options = {"name": name, "namespace": roster.NAMESPACE, "lifetime": "detached"}
        else:
            name = f"disagg_ray-{self._pipeline_id}-{post.name}" + (f".{incarnation}" if incarnation else "")
            options = {"name": name}
        return Actor(post, incarnation, actor_class.options(**options).remote(post.stage, post.index, config))

    def room_for(self, stage: str) -> int:
        """Return how many more replicas of a stage the cluster can take now; nodes are taken for one."""
        free = ray.available_resources()
        asked = {name: number for name, number in _resources(self.config.stages[stage]).items() if number}
        return min((int(round(free.get(name, 0) / number, DIGITS)) for name, number in asked.items()), default=MANY)

    def has_room(self, post: Post, config: Config) -> bool:
        """Return whether some node has room for one more replica at a post, or one that has is to come."""
        if post.stage in config.share_gpu or config.standing.cluster_grows:
            return post.stage not in config.share_gpu
        settings = config.for_group(post.stage, post.group).stages[post.stage]
        asked = {name: number for name, number in _resources(settings).items() if number}
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
    """Return a standing pipeline's actors, whoever launched them; their posts' groups are not known."""
    found = roster.find_replicas(name)
    return [Actor(Post(who.stage, who.index, ""), who.incarnation, handle) for who, handle in found.items()]


def _share(config: Config, **options: str) -> PlacementGroup:
    """Reserve one bundle for a replica of each stage that shares a GPU."""
    sharing = [config.stages[name] for name in config.share_gpu]
    labels: dict[str, str] = {}
    for stage in sharing:
        labels |= stage.label_selector
        if stage.accelerator_type is not None:
            labels["ray.io/accelerator-type"] = stage.accelerator_type
    asked = _add_up((1, _resources(stage)) for stage in sharing)
    bundle = {name: number for name, number in asked.items() if number}
    selector = [labels] if labels else None
    group: PlacementGroup = placement_group([bundle], bundle_label_selector=selector, **options)
    return group


async def gather_ready(config: Config, actors: Sequence[Actor], method: str, *args: Any) -> list[Any]:
    """Call every replica and wait until all have answered; say every few seconds what is missing.

    Raises:
        StartError: not all had by `cluster.start_timeout_s`.
        DisaggError: what a replica raised.
    """
    deadline = time.monotonic() + config.cluster.start_timeout_s
    calls = {actor.name: asyncio.ensure_future(ask(actor, method, *args)) for actor in actors}
    try:
        while missing := sorted(name for name, call in calls.items() if not call.done()):
            left = deadline - time.monotonic()
            if left <= 0:
                waiting = await off_loop(_waiting_for, config, missing)
                raise StartError(f"{waiting}: not ready within cluster.start_timeout_s")
            pending = [calls[name] for name in missing]
            done, _ = await asyncio.wait(pending, timeout=min(NOTICE_S, left), return_when=asyncio.FIRST_EXCEPTION)
            for call in done:
                call.result()
            if not done:
                logger.info(await off_loop(_waiting_for, config, missing))
        return [calls[actor.name].result() for actor in actors]
    finally:
        for call in calls.values():
            call.cancel()


async def ask(actor: Actor, method: str, *args: Any) -> Any:
    """Call a replica and await its answer, its errors made ours.

    One that cannot be reached is asked again for a while: it may have done what was asked, and does it once.

    Raises:
        ReplicaLost: it died or cannot be reached; it may have done what was asked or not.
        DisaggError: what it raised.
    """
    for pause_s in (*AGAIN_S, None):
        try:
            answer = await actor.call(method, *args)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DisaggError):
                raise cause from None
            raise StageError(f"{actor.name}: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.ActorUnavailableError as error:
            if pause_s is None:  # nobody is left there to say that it died
                reason = f"{actor.name}: the replica cannot be reached: {_reason(error)}"
                raise ReplicaLost(reason, with_node=True) from error
            logger.info("%s cannot be reached; it is asked again: %s", actor.name, _reason(error))
            await asyncio.sleep(pause_s)
        except ray.exceptions.RayError as error:
            reason = _reason(error)
            with_node = "node has died" in reason or getattr(error, "preempted", False)
            raise ReplicaLost(f"{actor.name}: the replica died: {reason}", with_node=with_node) from error
        else:
            break
    if isinstance(answer, DisaggError):
        raise answer
    return answer


def _reason(error: ray.exceptions.RayError) -> str:
    """Return the line of Ray's message that says why."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and "creation task" in lines[0]:
        return lines[-1]  # what the constructor raised
    return next((line for line in lines if "because" in line), lines[0] if lines else type(error).__name__)


def _waiting_for(config: Config, missing: Sequence[str]) -> str:
    free: Mapping[str, float] = ray.available_resources()
    shares = ", ".join(
        f"{kind} {number:g} (free now {free.get(kind, 0):g})"
        for kind, number in total_resources(config.stages).items()
        if number
    )
    return f"waiting for {', '.join(missing)}; the pipeline asks for {shares}"

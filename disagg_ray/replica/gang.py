"""The ranks of a replica seen from rank 0, in whose process this is: launched, loaded, and computing in step.

Peers are actors that this process owns, in bundles 1.. of its placement group. A request's collectives run on a thread
of their own, so that an error of any rank is noticed while the others wait for that rank. All of them agree on a
cancellation between two steps; every other error ends the replica, and its peers with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.errors import Cancelled, InputError, ReplicaLost, StartError
from disagg_ray.graph import Graph
from disagg_ray.models.parallel.ranks import Ranks, layout_of
from disagg_ray.replica.messages import RankInfo, RankMemory
from disagg_ray.replica.peer import Peer, describe_rank, end_with
from disagg_ray.replica.stage import Outputs, Stage
from disagg_ray.request import ResolvedRequest
from disagg_ray.text import printable
from disagg_ray.transfer.sockets import filter_of, listen

TOGETHER_S = 10.0
"""How long after one rank has ended its work with an error the others may take to end theirs with the same."""
NOTICE_S = 3.0
"""How long this process lives without one of its peers, for the driver to hear why."""
STALLS = 2
"""A collective may take this many times `failures.stall_s`: before that the driver replaces a replica that hangs."""


class Gang:
    """Owns the peers of a replica; used by the thread that computes."""

    def __init__(self, name: str, stage: Stage, config: Config, host: str) -> None:
        """Launch the peers; `host` is this node's address, at which they meet.

        Raises:
            StartError: one of them did not start.
        """
        self._name, self._stage, self._host = name, stage, host
        self._parallel = config.stages[stage.name].parallel
        self._ports, self._timeout_s = config.transport.ports, STALLS * config.failures.stall_s
        self._working = ThreadPoolExecutor(1, thread_name_prefix="disagg_ray-ranks")
        self._alive = listen(host, self._ports, filter_of(config.transport.admit))
        """Peers are connected to it for as long as this process lives."""
        remote: Any = ray.remote
        actor = remote(type(f"{stage.name.capitalize()}Rank", (Peer,), {}))
        settings, bundles = config.stages[stage.name], ray.util.get_current_placement_group()
        assert bundles is not None, "the driver launches rank 0 in its gang's bundles"
        self._peers = [
            actor.options(**rank_options(settings, bundles, rank)).remote(name, rank, stage.name, config)
            for rank in range(1, self._parallel.size)
        ]
        calls = [peer.follow.remote(host, self._alive.getsockname()[1]) for peer in self._peers]
        try:
            peers: list[RankInfo] = ray.get(calls, timeout=config.cluster.start_timeout_s)
        except ray.exceptions.RayError as error:
            raise StartError(f"{name}: a rank did not start: {_reason(error)}") from error
        for _ in self._peers:
            end_with(self._alive.accept()[0], NOTICE_S)
        self.ranks = (describe_rank(0, stage, host), *peers)
        self._peer_memory: tuple[RankMemory, ...] = ()
        """As of their latest work."""

    def load(self, graph: Graph) -> None:
        """Join the ranks and load the stage on all of them at once.

        Raises:
            DisaggError: what keeps this rank from loading.
            ReplicaLost: another rank did not load, or has died.
        """
        with listen(self._host, self._ports) as free:
            port = free.getsockname()[1]
        address = f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"
        calls = [peer.load.remote(graph, address, self._timeout_s) for peer in self._peers]

        def load() -> None:
            self._ranks = Ranks.join(0, address, self._parallel, self._stage.device, self._timeout_s)
            self._stage.load(self._ranks)

        self._together(load, calls)

    def compute(
        self,
        request: ResolvedRequest,
        tensors: Mapping[str, torch.Tensor],
        on_step: Callable[[int, int], None],
    ) -> Outputs:
        """Have every rank compute a request; return what rank 0 made.

        Raises:
            Cancelled: `on_step` raised it, after all ranks had stopped.
            ReplicaLost: a rank failed or died; the others may wait for it, and this process has to end.
        """

        def decide(step: int, steps: int) -> None:
            try:
                on_step(step, steps)
            except Cancelled:
                self._ranks.agree(False)
                raise
            self._ranks.agree(True)

        layout = layout_of(tensors)

        def compute() -> Outputs:
            return self._stage.compute(request, self._ranks.share(layout, tensors), decide)

        outputs: Outputs = self._together(compute, [peer.compute.remote(request, layout) for peer in self._peers])
        return outputs

    def memory(self) -> tuple[RankMemory, ...]:
        """Return the GPU memory of each rank."""
        return *self._stage.memory(), *self._peer_memory

    def _together(self, work: Callable[[], Any], calls: list[Any]) -> Any:
        """Do this rank's part of what the peers were called for; return what it returns once all have done theirs."""
        own = self._working.submit(work)
        parts: list[Future[Any]] = [own, *(call.future() for call in calls)]
        wait(parts, return_when=FIRST_EXCEPTION)
        if not _errors(parts):
            self._peer_memory = tuple(part.result() for part in parts[1:])
            return own.result()
        _, waiting = wait(parts, TOGETHER_S)
        errors = _errors(parts)
        if not waiting and len(errors) == len(parts) and all(map(_is_shared, errors.values())):
            return own.result()
        rank, error = min(errors.items(), key=lambda item: not isinstance(item[1], ray.exceptions.RayActorError))
        raise ReplicaLost(f"{self._name}: rank {rank} failed: {_reason(error)}") from error


def _errors(parts: list[Future[Any]]) -> dict[int, BaseException]:
    """Return what ended the parts that have failed, by rank."""
    done = {rank: part.exception() for rank, part in enumerate(parts) if part.done()}
    return {rank: error for rank, error in done.items() if error is not None}


def _is_shared(error: BaseException) -> bool:
    """Return whether a rank ended its work with an error that all ranks come to at the same place."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return isinstance(cause, Cancelled | InputError)


def _reason(error: BaseException) -> str:
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died"
    return f"{type(cause).__name__}: {printable((str(cause).strip().splitlines() or [''])[0])}"


def rank_options(settings: StageConfig, bundles: PlacementGroup, rank: int) -> dict[str, Any]:
    """Return Ray's options for a rank's process, which lies in the bundle of its number."""
    memory = {"memory": settings.memory} if settings.memory is not None else {}
    group = PlacementGroupSchedulingStrategy(bundles, rank)
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus, "resources": dict(settings.resources)}
    return {**resources, **memory, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": group}

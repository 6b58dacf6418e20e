"""A rank of a replica other than the first: computes what rank 0 does, and keeps nothing."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import psutil

from disagg_ray import environment
from disagg_ray.config.schema import Config
from disagg_ray.errors import Cancelled
from disagg_ray.graph import Graph
from disagg_ray.process import imports_kept
from disagg_ray.replica.messages import RankInfo, RankMemory
from disagg_ray.replica.stage import Stage
from disagg_ray.request import ResolvedRequest

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Layout, Ranks

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""In seconds: a node that is gone is noticed within half a minute."""


class Peer:
    """One process of a gang; rank 0 launches it (`gang`), and it ends with that process."""

    def __init__(self, name: str, rank: int, stage: str, config: Config) -> None:
        self.name, self._rank = f"{name}.{rank}", rank
        with imports_kept():
            self.stage = Stage(stage, config)
        self._ranks: Ranks

    def __repr__(self) -> str:  # Ray prefixes log lines and lists actors with it
        return self.name

    def follow(self, host: str, port: int) -> RankInfo:
        """Connect to rank 0's process, with whose end this one ends, even while it waits in a collective."""
        connection = socket.create_connection((host, port))
        connection.sendall(b"\0")  # the listener accepts a connection once data arrives
        end_with(connection)
        return describe_rank(self._rank, self.stage, connection.getsockname()[0])

    def load(self, graph: Graph, address: str, timeout_s: float) -> RankMemory:
        """Join the other ranks, which do the same at once, and load the weights."""
        from disagg_ray.models.parallel.ranks import Ranks  # replicas without peers do without torch.distributed

        self.stage.connect(graph)
        parallel = self.stage.config.stages[self.stage.name].parallel
        self._ranks = Ranks.join(self._rank, address, parallel, self.stage.device, timeout_s)
        self.stage.load(self._ranks)
        return self.stage.memory()[0]

    def compute(self, request: ResolvedRequest, layout: Layout) -> RankMemory:
        """Compute a request with the tensors that rank 0 shares now.

        Raises:
            Cancelled: rank 0 has cancelled it, between two steps.
        """

        def obey(step: int, steps: int) -> None:
            if not self._ranks.agree(True):
                raise Cancelled(f"{self.name}: cancelled at step {step} of {steps}")

        self.stage.compute(request, self._ranks.share(layout), obey)
        return self.stage.memory()[0]


def describe_rank(rank: int, stage: Stage, host: str) -> RankInfo:
    """Return what this process is; `host` is its node's address."""
    gpus = environment.visible_gpus() if stage.device == "cuda" else None
    return RankInfo(rank, psutil.Process().pid, stage.device, host, ",".join(gpus or ()))


def end_with(connection: socket.socket, after_s: float = 0.0) -> None:
    """End this process `after_s` seconds after the process or node at the other end of a connection is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    threading.Thread(target=_watch, args=(connection, after_s), name="disagg_ray-watchdog", daemon=True).start()


def _watch(connection: socket.socket, after_s: float) -> None:
    try:
        while connection.recv(1):
            pass
    except OSError:
        pass
    time.sleep(after_s)
    os._exit(1)

"""An engine in a thread, on a Ray cluster: started, called from any other thread, and closed whatever hangs."""

from __future__ import annotations

from dataclasses import replace

from disagg_ray.config.schema import Config
from disagg_ray.driver.cluster import Cluster
from disagg_ray.driver.engine import Engine
from disagg_ray.driver.loop import LoopThread
from disagg_ray.driver.threads import within
from disagg_ray.progress.events import Event
from disagg_ray.progress.listener import Listener
from disagg_ray.replica.messages import Health
from disagg_ray.scheduling.admission import Admission

STOP_S = 20.0
"""How long closing waits for requests that were cancelled and for the replicas."""
KILL_S = 5.0
"""The same, for replicas that did not end by then."""
SHUTDOWN_S = 15.0
"""The same, for Ray."""


class EngineHost:
    """Owns the engine, the loop that it lives on, the listener that takes its events, and a Ray that it started."""

    def __init__(
        self,
        config: Config,
        id: str,
        admission: Admission,
        loop: LoopThread,
        listener: Listener | None,
        *,
        detached: bool = False,
    ) -> None:
        """Join a Ray cluster or start one, and start the engine; close all if that fails."""
        self._loop, self._listener = loop, listener
        self._cluster: Cluster | None = None
        self._engine: Engine | None = None
        try:
            self._cluster = Cluster(config)
            if self._cluster.is_own and config.transport.admit == "auto":
                config = replace(config, transport=replace(config.transport, admit="host"))
            self._engine = Engine(config, id, admission, self._publish, detached=detached)
            loop.call(self._engine.start)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _publish(self, event: Event) -> None:
        if self._listener is not None:
            self._listener.notify(event)

    def health(self) -> dict[str, Health]:
        """Ask every replica for its health, by name; those that turn out to be lost are left out."""
        return self._loop.call(self.engine.health)

    def drain(self, grace_s: float) -> None:
        """Admit no more requests, give those that run `grace_s`, then cancel them. `close` comes after."""
        self._loop.call(self.engine.drain, grace_s)

    def close(self) -> None:
        """Cancel every request, end the replicas, and shut down a Ray that was started here. Idempotent.

        Returns within two minutes whatever hangs; that is left behind, which is logged, and ends with the process.
        """
        if self._loop.is_closed:
            return
        self._loop.check_thread()
        engine = self._engine
        if engine is not None and not self._loop.call_in_time(STOP_S, engine.stop):
            within(KILL_S, engine.fleet.kill, "killing the replicas")
        self._loop.close()
        if engine is not None:
            engine.close()
        if self._listener is not None:
            self._listener.close()
        if self._cluster is not None:
            within(SHUTDOWN_S, self._cluster.close, "shutting Ray down")

"""A model's service as an HTTP service sees it: how it is, and a connection for each worker's number."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from disagg_ray.config.schema import Config
from disagg_ray.errors import DisaggError
from disagg_ray.http.repeat import repeat
from disagg_ray.progress.events import Event
from disagg_ray.service.client import Connection, connect
from disagg_ray.service.protocol import Snapshot

logger = logging.getLogger("disagg_ray")

RETRY_S = 1.0
"""Between two tries to reach a service."""
LOOK_S = 2.0
"""Between two looks at how a service is."""
FRESH_S = 15.0
"""How old a look may be of a service that is ready."""


class Link:
    """Looks at a service again and again, and connects anew when it was taken down."""

    def __init__(
        self, model: str, config: Config, worker: int, on_event: Callable[[Event], None], closing: threading.Event
    ) -> None:
        """Look as a worker of this number, on a thread that ends when `closing` is set."""
        self.config = config
        self.snapshot: Snapshot | None = None
        """How the service was at the latest look."""
        self._model, self._worker, self._on_event, self._closing = model, worker, on_event, closing
        self._seen = time.monotonic()
        self._connections: dict[int, Connection] = {}
        self._lock = threading.Lock()
        """Of `_connections`."""
        watch = partial(repeat, f"watch {model}", self._look, lambda: LOOK_S if self.snapshot else 0.0, closing)
        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether every stage of the service had a replica a moment ago."""
        return self.lost_s < FRESH_S and self.snapshot is not None and all(self.replicas.values())

    @property
    def lost_s(self) -> float:
        """For how long the service has not answered."""
        return time.monotonic() - self._seen

    @property
    def replicas(self) -> dict[str, int]:
        return {stage.stage: stage.ready for stage in self.snapshot.stages} if self.snapshot else {}

    def connection(self, worker: int) -> Connection | None:
        """Return the connection of a worker's number, as soon as there is one; None: this closes."""
        said = ""
        while not self._closing.is_set():
            with self._lock:
                if worker in self._connections:
                    return self._connections[worker]
                try:
                    made = connect(self._model, run_id=f"http-{worker}", on_event=self._on_event)
                except DisaggError as error:
                    if said != (said := str(error)):
                        logger.warning("model %s: %s", self._model, error)
                else:
                    self.config = made.config
                    self._connections[worker] = made
                    return made
            self._closing.wait(RETRY_S)
        return None

    def drain(self, grace_s: float) -> None:
        """Give running requests some seconds to end."""
        for connection in list(self._connections.values()):
            connection.drain(grace_s)

    def close(self) -> None:
        for connection in list(self._connections.values()):
            connection.close()
        self._thread.join(LOOK_S)

    def _look(self) -> None:
        """Ask the service how it is; connect anew when it was taken down."""
        for worker in list(self._connections) or [self._worker]:
            connection = self.connection(worker)
            if connection is None:
                return
            try:
                self.snapshot, self._seen = connection.snapshot(), time.monotonic()
                self.config = self.snapshot.config  # a rollout changes it
            except DisaggError as error:
                if self._closing.is_set():
                    return
                logger.warning("model %s: %s; connecting again", self._model, error)
                with self._lock:
                    del self._connections[worker]
                connection.close()  # its jobs end with Cancelled and are run again

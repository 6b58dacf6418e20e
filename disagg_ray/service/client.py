"""The client of a service."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray

from disagg_ray.config.schema import Config
from disagg_ray.driver.api import PipelineApi
from disagg_ray.driver.cluster import join
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.errors import Cancelled
from disagg_ray.media.video import to_array
from disagg_ray.models.prompts import check_prompts
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import Health, ReplicaInfo
from disagg_ray.replica.software import Software, check_same
from disagg_ray.request import Request, resolve
from disagg_ray.result import Result
from disagg_ray.service.protocol import Snapshot, SubmitMessage, UnknownRequest
from disagg_ray.service.stub import SupervisorStub

logger = logging.getLogger("disagg_ray")

LEAVE_S = 5.0


class Connection(PipelineApi):
    """Has `Pipeline`'s methods; a service in the cluster does the work.

    Requests submitted under a run id can be submitted again under it, by another process too: those that are finished
    or in flight are not computed again. While one is in flight, the same id with another prompt, image or other field
    is refused, as a second request of one id is in one process.

    A supervisor that dies is waited for. If it does not return, or hangs, for PROBE_S + RETURN_S (150 s), every request
    that waits for it fails with `ReplicaLost`.
    """

    def __init__(
        self,
        name: str,
        address: str | None = None,
        run_id: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Connect to a service by its name; wait until it is ready.

        Raises:
            InputError: no service has this name; names those that run.
            StartError: there is no cluster, the service did not start, or it runs another version than this client.
        """
        join(address)
        self._supervisor = SupervisorStub(name)
        super().__init__(run_id or uuid.uuid4().hex[:8], on_event)
        self.name = name
        self._keep = run_id is not None
        self._client = uuid.uuid4().hex
        self.unacknowledged: list[tuple[str, str]] = []
        """Ids and tickets of finished requests whose end the supervisor has not acknowledged."""
        self._held: dict[str, str] = {}
        """Tickets by id of finished requests that the service keeps until `acknowledge`."""
        self._closed = False
        self._background = BackgroundTasks()
        self._listening: asyncio.Task[None] | None = None
        try:
            theirs = self.loop.call(self._supervisor.ask_promptly, "software")
            check_same(f"service {name}", Software(*theirs), "this client")
            self._config = self.snapshot().config
            self.loop.call(self._start_listening)
        except BaseException:
            self.close()
            raise

    def submit(
        self, request: Request, *, wait: bool = True, latents_file: Path | None = None, hold: bool = False
    ) -> Handle:
        """Check a request and queue it at the service; see `Pipeline.submit`.

        Each client may have `limits.max_queued` unfinished requests there. The service keeps finished latents, under
        the run id, and never sends them here: of `latents_file` it only matters whether it is given. With `hold` it
        keeps the result too, until `acknowledge`: if this process dies before that, another one of the run id that
        submits the request within `service.client_timeout_s` gets the result, and nothing is computed again.

        Raises:
            RequestError: the request cannot be served by this model and configuration, or its id is in flight already.
            Overloaded: there is no room, and `wait` is False.
            Cancelled: the connection is closed, or the service was taken down.
            ReplicaLost: the supervisor died and did not return, or it hangs.
        """
        resolved, images = resolve(request, self.config)
        check_prompts(resolved, self.config.model)
        if self._closed:
            raise Cancelled("the connection is closed")
        keep = self._keep or latents_file is not None
        pixels = {name: to_array(image) for name, image in images.items()}
        message = SubmitMessage(resolved, pixels, keep, self._client)
        return self._launch(resolved, partial(self._run, message=message, wait=wait, hold=hold))

    async def _run(
        self, handle: Handle, on_queued: Callable[[], None], message: SubmitMessage, *, wait: bool, hold: bool
    ) -> Result:
        """Have a request computed; submit it again whenever the supervisor has forgotten it."""
        request_id, is_held = handle.request.id, False
        try:
            while True:
                await self._supervisor.ask_while_alive("submit", self.id, message, wait=wait)
                on_queued()
                wait = True
                try:
                    result: Result = await self._supervisor.ask_while_alive(
                        "result", self.id, request_id, message.ticket
                    )
                except UnknownRequest:
                    continue
                is_held = hold
                return result
        except asyncio.CancelledError:
            self._supervisor.actor.cancel.remote(self.id, request_id, message.ticket)
            raise
        finally:
            if is_held:
                self._held[request_id] = message.ticket
            else:
                self.unacknowledged.append((request_id, message.ticket))

    def acknowledge(self, request_id: str) -> None:
        """Let the service forget a finished request that was submitted with `hold`; no other is touched."""
        if (ticket := self._held.pop(request_id, None)) is not None:
            self.unacknowledged.append((request_id, ticket))

    async def _start_listening(self) -> None:
        self._listening = self._background.start("listen", self._listen)

    async def _listen(self) -> None:
        """Send the supervisor one heartbeat after the other, and publish the events that it answers."""
        while True:
            num_finished = len(self.unacknowledged)
            try:
                events = await self._supervisor.ask("listen", self.id, self._client, self.unacknowledged[:num_finished])
            except Cancelled as error:
                logger.warning("%s", error)
                return
            self._supervisor.note_heartbeat()
            del self.unacknowledged[:num_finished]
            for event in events:
                if (handle := self._in_flight.get(event.request_id)) is not None:
                    handle.progress = event
                if self.listener is not None:
                    self.listener.notify(event)

    def snapshot(self) -> Snapshot:
        """Return the service's state; wait while its supervisor starts or returns.

        Raises:
            ReplicaLost: it did not return, or it hangs.
        """
        self.loop.call(self._supervisor.ask_promptly, "snapshot")  # a supervisor that starts answers this too
        self.loop.call(self._supervisor.ask_while_alive, "ready")
        snapshot: Snapshot = self.loop.call(self._supervisor.ask_promptly, "snapshot")
        return snapshot

    def health(self) -> dict[str, Health]:
        """Ask every replica for its health, by name; those that turn out to be lost are left out."""
        ask, extra_s = self._supervisor.ask_promptly, self.config.failures.answer_s
        health: dict[str, Health] = self.loop.call(ask, "health", extra_s)
        return health

    @property
    def config(self) -> Config:
        """The service's configuration when this client connected."""
        return self._config

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Those that serve now."""
        return self.snapshot().replicas

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often a replica was replaced since the supervisor started, by stage."""
        return self.snapshot().num_restarts

    @property
    def driver_bytes_in_use(self) -> int:
        """Bytes of the supervisor's own pool that requests take, of all clients."""
        return self.snapshot().driver_bytes_in_use

    def drain(self, grace_s: float) -> None:
        """Submit nothing more, give requests `grace_s` seconds to finish, then cancel them. `close` comes after."""
        self.loop.check_thread()
        self._closed = True
        handles = self.in_flight
        deadline = time.monotonic() + grace_s
        for handle in handles:
            handle.future.wait(max(0.0, deadline - time.monotonic()))
        if self._listening is not None:  # what is cancelled from here on is not reported as finished: its latents stay
            self.loop.call_soon(self._listening.cancel)
        for handle in handles:
            handle.cancel()

    def close(self) -> None:
        """Cancel what runs and leave; the service keeps running. Idempotent."""
        if self.loop.is_closed:
            return
        self.drain(0)
        self.loop.call_in_time(2 * LEAVE_S, self._end)
        self.loop.close()
        if self.listener is not None:
            self.listener.close()

    async def _end(self) -> None:
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=LEAVE_S)
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._supervisor.actor.leave.remote(self.id, self._client)
        except (TimeoutError, ray.exceptions.RayError):
            logger.info("service %s could not be notified that this client left; it will notice", self.name)


def connect(
    name: str,
    *,
    address: str | None = None,
    run_id: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Connection:
    """Connect to a service, which `disagg-ray up NAME` deployed; see `Connection`."""
    return Connection(name, address, run_id, on_event)

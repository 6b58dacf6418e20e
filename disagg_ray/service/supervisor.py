"""The detached actor that owns a service and computes its clients' requests.

A plain class, started by `lifecycle`. Ray restarts it when it dies; it then adopts the replicas that live, and clients
submit again what was not answered.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import ray
import torch

from disagg_ray.config.deployment import ServiceConfig
from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.driver.threads import begin
from disagg_ray.errors import Cancelled, DisaggError, InputError
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import Health
from disagg_ray.replica.software import software
from disagg_ray.result import Result
from disagg_ray.service.latents_store import LatentsStore
from disagg_ray.service.pipeline import ServicePipeline
from disagg_ray.service.protocol import Snapshot, SubmitMessage, UnknownRequest, answers
from disagg_ray.service.submissions import ClientState, Entry

logger = logging.getLogger("disagg_ray")

LOOKS = 4
"""For a client's next heartbeat, before it counts as gone."""
MAX_STARTS = 3
"""After so many failures in a row, those who wait get the error."""
RETRY_S = 20.0
"""Wait between such a failure and the next start; on a thread of its own."""


class Supervisor:
    """Its methods run on the actor's event loop and return expected errors instead of raising them."""

    def __init__(self, name: str, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self._name, self._config = name, config
        self._began, self._began_at = time.monotonic(), time.time()
        self._clients: dict[str, ClientState] = {}
        self._background = BackgroundTasks(self._count_restart)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: Future[ServicePipeline] = Future()
        begin(self._start, "start")

    def _start(self) -> None:
        """Start the pipeline, however often that must be tried: what it lacks may come back. `up` ends a new one."""
        for num_failures in itertools.count(1):
            try:
                pipeline = ServicePipeline(self._config, self._name, self._relay)
            except Exception as error:  # noqa: BLE001 - passed to those who wait for the pipeline
                logger.warning("service %s did not start: %s", self._name, error)
                may_pass = isinstance(error, DisaggError) and not isinstance(error, InputError)
                if num_failures >= MAX_STARTS or not may_pass:
                    self._starting.set_exception(error)
                    time.sleep(RETRY_S)
                    self._starting = Future()
            else:
                self._starting.set_result(pipeline)
                return

    async def _started(self) -> ServicePipeline:
        """Return the pipeline once it is ready.

        Raises:
            DisaggError: why it did not start.
        """
        self._loop = asyncio.get_running_loop()
        return await asyncio.shield(asyncio.wrap_future(self._starting))

    async def software(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """Return what runs here, in plain types: a client of another version understands them too."""
        ours = software()
        return ours.folder, ours.digest, ours.versions

    @answers
    async def ready(self) -> None:
        """Wait until every stage has its replicas."""
        await self._started()

    @answers
    async def submit(self, run_id: str, message: SubmitMessage, *, wait: bool) -> None:
        """Queue a request, or find that it is here already; wait for room, or answer `Overloaded`."""
        pipeline, request = await self._started(), message.request
        if message.keep:
            await asyncio.to_thread(self._latents.evict)
        room = pipeline.engine.config.limits.max_queued
        await self._client(run_id, message.client).wait_for_room(message, room, wait=wait)
        client = self._clients.get(run_id)  # another, if it has been away meanwhile
        if client is None or message.client not in client.heartbeats:
            raise Cancelled(f"request {request.id}: its client {run_id} left, or its heartbeat stopped")
        if message.ticket in client.cancelled:
            raise Cancelled(f"request {request.id} was cancelled before there was room for it")
        if (entry := client.entries.get(request.id)) is not None:
            if entry.serves(message, pipeline.setup):
                entry.message = message
                entry.tickets.add(message.ticket)
                return
            entry.replace_by(message)
        inner = replace(request, id=f"{client.tag}/{request.id}")
        images = {name: torch.from_numpy(pixels.copy()) for name, pixels in message.images.items()}
        latents = self._latents.file(run_id, request.id) if message.keep else None
        handle = pipeline.enqueue(inner, images, latents, run_id)
        client.entries[request.id] = Entry(message, handle, pipeline.setup, {message.ticket})
        handle.add_done_callback(partial(self._note_finished, client))

    @answers
    async def result(self, run_id: str, request_id: str, ticket: str) -> Result:
        """Wait for a request that was submitted, unless another has replaced it since."""
        entry = self._entry(run_id, request_id)
        if entry is None or ticket not in entry.tickets:
            raise UnknownRequest(f"request {request_id} is not known to the service")
        try:
            result = await asyncio.shield(asyncio.wrap_future(entry.handle.future))
        except asyncio.CancelledError:
            if entry.handle.done():
                raise Cancelled(f"request {request_id} was cancelled") from None
            raise
        return replace(result, request=entry.message.request)

    async def cancel(self, run_id: str, request_id: str, ticket: str) -> bool:
        """Cancel a request, unless it was submitted again since."""
        entry = self._entry(run_id, request_id)
        return entry is not None and entry.message.ticket == ticket and entry.handle.cancel()

    async def listen(self, run_id: str, connection: str, finished: list[tuple[str, str]]) -> list[Event]:
        """Note a connection's heartbeat and which answers it has; return its client's events, none after a while."""
        self._loop = asyncio.get_running_loop()
        client, done = self._client(run_id, connection), list[str]()
        for request_id, ticket in finished:
            entry = client.entries.get(request_id)
            if entry is not None and entry.message.ticket != ticket:
                continue  # it was submitted again since
            if entry is None:
                client.cancelled.append(ticket)
            else:
                del client.entries[request_id]
                entry.handle.cancel()  # the client may have cancelled it before it was queued
            done.append(request_id)
        if done:
            await asyncio.to_thread(self._latents.drop, run_id, done)
        try:
            async with asyncio.timeout(self._settings.client_timeout_s / 4):
                await client.has_events.wait()
        except TimeoutError:
            return []
        client.has_events.clear()
        events = list(client.events)
        client.events.clear()
        return events

    def _note_finished(self, client: ClientState, _: Handle) -> None:
        """Wake what waits for a client's requests; called on the pipeline's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(client.has_finished.set)

    async def leave(self, run_id: str, connection: str) -> None:
        """End a connection: cancel its unfinished requests. Those of others under its run id go on."""
        if (client := self._clients.get(run_id)) is not None:
            client.leave(connection)
            if not client.heartbeats:
                del self._clients[run_id]

    def _entry(self, run_id: str, request_id: str) -> Entry | None:
        client = self._clients.get(run_id)
        return client.entries.get(request_id) if client is not None else None

    def _client(self, run_id: str, connection: str) -> ClientState:
        """Return a client; this is a heartbeat of one of its connections."""
        client = self._clients.setdefault(run_id, ClientState(run_id))
        if connection not in client.heartbeats:
            self._background.start("supervisor_watch", self._watch, client, connection)
        client.heartbeats[connection] = client.heartbeats.get(connection, 0) + 1
        return client

    @property
    def _settings(self) -> ServiceConfig:
        """What is in force now: `up` may change it."""
        config = self._pipeline.engine.config if self._pipeline is not None else self._config
        return config.service

    @property
    def _latents(self) -> LatentsStore:
        return LatentsStore(self._name, self._settings.latents_bytes, self._settings.latents_expire_s)

    @property
    def _pipeline(self) -> ServicePipeline | None:
        """The pipeline; None: it is not ready."""
        starting = self._starting
        return starting.result() if starting.done() and starting.exception() is None else None

    def _count_restart(self, name: str) -> None:
        if self._pipeline is not None:
            self._pipeline.note_restart(name)

    async def _watch(self, client: ClientState, connection: str) -> None:
        """Cancel a connection's requests once its heartbeat has stopped for `service.client_timeout_s`.

        However long this process itself is stopped meanwhile, as by SIGSTOP, that counts as one look: what clients sent
        is read after it.
        """
        seen, num_quiet = 0, 0
        while (heartbeat := client.heartbeats.get(connection)) is not None:
            num_quiet = num_quiet + 1 if heartbeat == seen else 0
            seen, timeout_s = heartbeat, self._settings.client_timeout_s
            if num_quiet < LOOKS:
                await asyncio.sleep(timeout_s / LOOKS)
                continue
            logger.warning("no heartbeat from client %s for %g s; cancelling its requests", client.run_id, timeout_s)
            await self.leave(client.run_id, connection)

    def _relay(self, event: Event) -> None:
        """Pass on an event from the pipeline's thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._publish, event)

    def _publish(self, event: Event) -> None:
        """Keep an event for its client to fetch."""
        tag, _, request_id = event.request_id.partition("/")
        for client in self._clients.values():
            if client.tag == tag:
                client.events.append(replace(event, request_id=request_id))
                client.has_events.set()

    async def snapshot(self) -> Snapshot:
        """Return the service's state, while it starts too."""
        node, pid = ray.util.get_node_ip_address(), os.getpid()
        clients = {client.run_id: client.num_unfinished for client in self._clients.values()}
        age_s = time.monotonic() - self._began
        snapshot = Snapshot(self._name, "starting", self._config, self._began_at, age_s, node, pid, clients)
        if not (starting := self._starting).done():
            return snapshot
        if (error := starting.exception()) is not None:
            return replace(snapshot, state=f"failed: {error}")
        pipeline = starting.result()
        queued, stages = await asyncio.to_thread(pipeline.survey)
        engine, fleet = pipeline.engine, pipeline.fleet
        state = f"failed: {engine.failure}" if engine.failure else "ready"
        return replace(
            snapshot, state=state, config=engine.config, queued=queued, stages=stages, replicas=fleet.replicas,
            num_restarts=dict(fleet.num_restarts), rollout=pipeline.rollouts.status,
            driver_bytes_in_use=engine.driver_bytes_in_use,
        )  # fmt: skip

    @answers
    async def health(self) -> dict[str, Health]:
        return await asyncio.to_thread((await self._started()).host.health)

    @answers
    async def scale(self, stage: str, replicas: int) -> None:
        await asyncio.wrap_future((await self._started()).scale(stage, replicas))

    @answers
    async def change(self, config: Config) -> None:
        """Become what a configuration says; answer when all that it asks for serve, or why it stays as it was."""
        await asyncio.wrap_future((await self._started()).change(config))

    async def end(self, grace_s: float) -> None:
        """Give running requests `grace_s` seconds to finish, then end the replicas and leave nothing behind."""
        if (pipeline := self._pipeline) is not None:
            await asyncio.to_thread(pipeline.host.drain, grace_s)
            await asyncio.to_thread(pipeline.host.close)
        await asyncio.to_thread(self._latents.clear)

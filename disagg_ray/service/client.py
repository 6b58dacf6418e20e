"""A driver's end of a service."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray

from disagg_ray.config.schema import Config
from disagg_ray.driver.api import PipelineApi
from disagg_ray.driver.cluster import join
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.names import find_supervisor
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import Cancelled, DisaggError, InputError, ReplicaLost, StageError, StartError
from disagg_ray.media.video import to_array
from disagg_ray.models.prompts import check_prompts
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import Health, ReplicaInfo
from disagg_ray.replica.software import Software, check_same
from disagg_ray.request import Request, resolve
from disagg_ray.result import Result
from disagg_ray.service.protocol import Snapshot, SubmitMessage, UnknownRequest

logger = logging.getLogger("disagg_ray")

RETURN_S = 120.0
"""How long a supervisor that died may take to be back."""
RETRY_S = 0.5
ANSWER_S = 10.0
"""How long a supervisor may take to say how it is."""
LEAVE_S = 5.0


class Connection(PipelineApi):
    """Has `Pipeline`'s methods; the work is done by a service in the cluster.

    What was asked under a run id can be asked again under it, by another process too: what is finished or on its way
    there is not computed again. While it is on its way, the same id with another prompt, image or other field is
    refused, as a second request of one id is in one process.
    """

    def __init__(
        self,
        name: str,
        address: str | None = None,
        run_id: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Connect to a pipeline by its name; wait until it is ready.

        Raises:
            InputError: no such pipeline stands; names those that do.
            StartError: there is no cluster, the pipeline did not start, or it is of another version than this client.
        """
        join(address)
        self._actor = find_supervisor(name)
        super().__init__(run_id or uuid.uuid4().hex[:8], on_event)
        self.name = name
        self._keep = run_id is not None
        self._client = uuid.uuid4().hex
        self._finished: list[tuple[str, str]] = []
        """Ids and tickets of requests whose answer is here, which the supervisor has not been told yet."""
        self._closed = False
        self._background = BackgroundTasks()
        self._listening: asyncio.Task[None] | None = None
        try:
            check_same(f"pipeline {name}", Software(*self.loop.call(self._ask, "software")), "this client")
            if (error := self.loop.call(self._ask, "ready")) is not None:
                raise error
            self._config = self.snapshot().config
            self.loop.call(self._begin_to_listen)
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request, *, wait: bool = True, latents_file: Path | None = None) -> Handle:
        """Check a request and queue it at the pipeline; see `Pipeline.submit`.

        Each driver may have `limits.max_queued` unfinished requests there. Finished latents are kept at the pipeline,
        under the run id, and never come here: of `latents_file` counts only whether it is given.

        Raises:
            RequestError: the request cannot be served by this model and configuration, or its id is in flight already.
            Overloaded: there is no room, and `wait` is False.
            Cancelled: the connection is closed, or the pipeline was taken down.
        """
        resolved, images = resolve(request, self.config)
        check_prompts(resolved, self.config.model)
        if self._closed:
            raise Cancelled("the connection is closed")
        keep = self._keep or latents_file is not None
        pixels = {name: to_array(image) for name, image in images.items()}
        asked = SubmitMessage(resolved, pixels, keep, self._client)
        return self._launch(resolved, partial(self._run, asked=asked, wait=wait))

    async def _run(self, handle: Handle, on_queued: Callable[[], None], asked: SubmitMessage, *, wait: bool) -> Result:
        """Have a request computed; submit it again whenever the supervisor has forgotten it."""
        request_id = handle.request.id
        try:
            while True:
                error = await self._ask("submit", self.id, asked, wait=wait)
                if error is not None:
                    raise error
                on_queued()
                wait = True
                answer: Result | DisaggError = await self._ask("result", self.id, request_id, asked.ticket)
                if isinstance(answer, Result):
                    return answer
                if not isinstance(answer, UnknownRequest):
                    raise answer
        except asyncio.CancelledError:
            self._actor.cancel.remote(self.id, request_id, asked.ticket)
            raise
        finally:
            self._finished.append((request_id, asked.ticket))

    async def _begin_to_listen(self) -> None:
        self._listening = self._background.start("listen", self._listen)

    async def _listen(self) -> None:
        """Tell the supervisor again and again that this driver lives, and hear what becomes of its requests."""
        while True:
            told = len(self._finished)
            try:
                events = await self._ask("listen", self.id, self._finished[:told])
            except Cancelled as error:
                logger.warning("%s", error)
                return
            del self._finished[:told]
            for event in events:
                if (handle := self._in_flight.get(event.request_id)) is not None:
                    handle.progress = event
                if self.listener is not None:
                    self.listener.hear(event)

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the supervisor; wait for it when it died.

        Raises:
            Cancelled: it was taken down.
            ReplicaLost: it was not back after RETURN_S.
        """
        deadline = None
        while True:
            try:
                return await getattr(self._actor, method).remote(*args, **options)
            except ray.exceptions.RayTaskError as error:
                raise StageError(f"pipeline {self.name}: {error.cause}") from error
            except ray.exceptions.RayError as error:
                deadline = deadline or time.monotonic() + RETURN_S
                if isinstance(error, ray.exceptions.ActorDiedError):
                    await self._check_stands()
                if time.monotonic() > deadline:
                    raise ReplicaLost(f"pipeline {self.name}: not back after {RETURN_S:g} s: {error}") from error
            await asyncio.sleep(RETRY_S)

    async def _ask_within(self, timeout_s: float, method: str) -> Any:
        """Call the supervisor for what takes it no time.

        Raises:
            ReplicaLost: it hangs.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(method)
        except TimeoutError:
            silence = f"its supervisor does not answer within {timeout_s:g} s"
            raise ReplicaLost(f"pipeline {self.name}: {silence}") from None

    async def _check_stands(self) -> None:
        try:
            await off_loop(find_supervisor, self.name)
        except InputError:
            raise Cancelled(f"pipeline {self.name} was taken down") from None
        except StartError as error:  # the cluster does not answer either
            logger.warning("pipeline %s: %s", self.name, error)

    def snapshot(self) -> Snapshot:
        """Ask how the pipeline is; wait while its supervisor comes back.

        Raises:
            ReplicaLost: it did not, or it hangs.
        """
        self.loop.call(self._ask_within, RETURN_S, "snapshot")  # a supervisor that starts answers this too
        self.loop.call(self._ask, "ready")
        snapshot: Snapshot = self.loop.call(self._ask_within, RETURN_S, "snapshot")
        return snapshot

    def health(self) -> dict[str, Health]:
        """Ask every replica how it is, by name."""
        timeout_s = self.config.failures.answer_s + RETURN_S
        health: dict[str, Health] = self.loop.call(self._ask_within, timeout_s, "health")
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
        """Bytes of the supervisor's own pool that requests take, of all drivers."""
        return self.snapshot().driver_bytes_in_use

    def drain(self, grace_s: float) -> None:
        """Submit nothing more, give what runs so many seconds, then cancel it. `close` comes after."""
        self.loop.check_thread()
        self._closed = True
        handles = self.in_flight
        deadline = time.monotonic() + grace_s
        for handle in handles:
            handle.future.wait(max(0.0, deadline - time.monotonic()))
        if self._listening is not None:  # what is cancelled from here on is not told as finished: its latents stay
            self.loop.call_soon(self._listening.cancel)
        for handle in handles:
            handle.cancel()

    def close(self) -> None:
        """Cancel what runs and leave; the pipeline stands on. Idempotent."""
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
                await self._actor.leave.remote(self.id)
        except (TimeoutError, ray.exceptions.RayError):
            logger.info("pipeline %s did not hear that this driver left; it will notice", self.name)


def fetch_config(name: str) -> Config:
    """Return the configuration of a service in the cluster that was joined.

    Raises:
        InputError: no such pipeline stands; names those that do.
        StartError: it does not answer.
    """
    return take_snapshot(name).config


def take_snapshot(name: str) -> Snapshot:
    """Ask a pipeline how it is.

    Raises:
        InputError: no such pipeline stands; names those that do.
        StartError: it does not answer.
    """
    try:
        answer: Any = ray.get(find_supervisor(name).snapshot.remote(), timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        raise StartError(f"{name}: its supervisor does not answer: it is being restarted; try again") from error
    assert isinstance(answer, Snapshot)
    return answer


def connect(
    name: str,
    *,
    address: str | None = None,
    run_id: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Connection:
    """Connect to a service, which `disagg-ray up NAME` deployed; see `Connection`."""
    return Connection(name, address, run_id, on_event)

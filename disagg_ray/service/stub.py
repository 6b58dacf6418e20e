"""Calls to a service's supervisor, which may die and be restarted, or hang."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray

from disagg_ray.driver.calls import unwrap
from disagg_ray.driver.names import find_supervisor
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import Cancelled, InputError, ReplicaLost, StageError, StartError
from disagg_ray.service.protocol import Snapshot

logger = logging.getLogger("disagg_ray")

RETURN_S = 120.0
"""How long a supervisor that died may take to return, or one that hangs to answer."""
PROBE_S = 30.0
"""Time without an answered heartbeat after which a supervisor is probed."""
RETRY_S = 0.5
ANSWER_S = 10.0
"""How long a supervisor may take to return its state."""


class SupervisorStub:
    """A supervisor as a client's event loop calls it."""

    def __init__(self, name: str) -> None:
        """Find the supervisor of a service.

        Raises:
            InputError: no service has this name; names those that run.
        """
        self.name = name
        self.actor = find_supervisor(name)
        self._last_heartbeat = time.monotonic()

    def note_heartbeat(self) -> None:
        """Note that the supervisor answered a heartbeat."""
        self._last_heartbeat = time.monotonic()

    async def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the supervisor; wait for it when it died.

        Raises:
            Cancelled: it was taken down.
            ReplicaLost: it was not back after RETURN_S.
            DisaggError: what it answered.
        """
        deadline = None
        while True:
            try:
                return unwrap(await getattr(self.actor, method).remote(*args, **options))
            except ray.exceptions.RayTaskError as error:
                raise StageError(f"service {self.name}: {error.cause}") from error
            except ray.exceptions.RayError as error:
                deadline = deadline or time.monotonic() + RETURN_S
                if isinstance(error, ray.exceptions.ActorDiedError):
                    await self._check_running()
                if time.monotonic() > deadline:
                    raise ReplicaLost(f"service {self.name}: not back after {RETURN_S:g} s: {error}") from error
            await asyncio.sleep(RETRY_S)

    async def ask_while_alive(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the supervisor for what takes as long as requests do.

        Raises:
            ReplicaLost: it answered neither heartbeats nor a probe: it hangs.
        """
        call, began = asyncio.ensure_future(self.ask(method, *args, **options)), time.monotonic()
        try:
            while not call.done():
                left = max(began, self._last_heartbeat) + PROBE_S - time.monotonic()
                if left <= 0:
                    await self.ask_promptly("software")
                    self._last_heartbeat = time.monotonic()
                else:
                    await asyncio.wait({call}, timeout=left)
            return call.result()
        finally:
            call.cancel()

    async def ask_promptly(self, method: str, extra_s: float = 0.0) -> Any:
        """Call the supervisor for what it answers at once, or within `extra_s`.

        Raises:
            ReplicaLost: it hangs.
        """
        timeout_s = RETURN_S + extra_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self.ask(method)
        except TimeoutError:
            raise ReplicaLost(f"service {self.name}: its supervisor does not answer within {timeout_s:g} s") from None

    async def _check_running(self) -> None:
        try:
            found = await off_loop(find_supervisor, self.name)
        except InputError:
            raise Cancelled(f"service {self.name} was taken down") from None
        except StartError as error:  # the cluster does not answer either
            logger.warning("service %s: %s", self.name, error)
        else:
            if found != self.actor:
                raise Cancelled(f"service {self.name} was taken down, and put up again; connect to the new one")


def value_of(answer: Any, timeout_s: float | None = None) -> Any:
    """Wait for a supervisor's answer to a remote call and return it, outside an event loop.

    Raises:
        StartError: it died, or does not answer in time.
        DisaggError: what it answered.
    """
    try:
        return unwrap(ray.get(answer, timeout=timeout_s))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise StartError(f"the supervisor died or does not answer: {reason}") from error


def take_snapshot(name: str) -> Snapshot:
    """Return a service's state.

    Raises:
        InputError: no service has this name; names those that run.
        StartError: it does not answer.
    """
    try:
        snapshot: Snapshot = value_of(find_supervisor(name).snapshot.remote(), ANSWER_S)
    except StartError as error:
        raise StartError(f"{name}: its supervisor does not answer: it is being restarted; try again") from error
    return snapshot

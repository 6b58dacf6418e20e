"""Posts that wait for a replica, and stages that have none left; all on the driver's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from disagg_ray.errors import StartError
from disagg_ray.scheduling.blame import pause_s

logger = logging.getLogger("disagg_ray")


P = TypeVar("P", bound=Hashable)


class Vacancies(Generic[P]):
    """Posts that are to be taken; one that nobody takes for long is closed for a while, as `blame` says."""

    def __init__(self) -> None:
        self._fruitless: Counter[P] = Counter()
        self._open: dict[P, asyncio.Event] = {}
        """Set: try now."""

    def __iter__(self) -> Iterator[P]:
        return iter(self._open)

    @contextmanager
    def filling(self, post: P) -> Iterator[None]:
        """Count a post as vacant meanwhile."""
        self._open[post] = asyncio.Event()
        try:
            yield
        finally:
            del self._open[post]

    def note_failure(self, post: P) -> int:
        """Note that a replica did not start there, or was lost before it had computed anything; return how many."""
        self._fruitless[post] += 1
        return self._fruitless[post]

    def note_success(self, post: P) -> None:
        """Note that a replica computed something there."""
        self._fruitless.pop(post, None)

    def pause_s(self, post: P) -> float:
        return pause_s(self._fruitless[post])

    async def closed_time(self, post: P) -> None:
        """Wait for as long as a post is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pause_s(post)):
                await self._open[post].wait()
        self._open[post].clear()

    def reopen(self) -> None:
        """Have every vacant post tried at once."""
        self._fruitless.clear()
        for now in self._open.values():
            now.set()


class Outages:
    """Stages without a replica: their requests wait for one within a limit, then fail by name.

    `on_change` is called with the reason when a stage's outage lasts too long: nothing can be served then. It is
    called with None when every stage has a replica again.
    """

    def __init__(self, stages: Iterable[str], on_change: Callable[[StartError | None], None]) -> None:
        self._served = {stage: asyncio.Event() for stage in stages}
        self._over_time: set[str] = set()
        self._on_change = on_change
        self.reasons: dict[str, object] = {}
        """Why a replica last did not start, by stage."""

    def end(self, stage: str) -> None:
        """Note that a stage has a replica."""
        self._served[stage].set()
        if stage in self._over_time:
            self._over_time.discard(stage)
            if not self._over_time:
                logger.warning("every stage has a replica again: requests are taken")
                self._on_change(None)

    def begin(self, stage: str) -> None:
        """Note that a stage has none left."""
        self._served[stage].clear()

    async def limit(self, stage: str, limit_s: float) -> None:
        """Bear a stage's outage for `cluster.start_timeout_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._served[stage].wait()
        except TimeoutError:
            reason = self.reasons.get(stage, "it is still starting")
            self.give_up(stage, f"none started within cluster.start_timeout_s={limit_s:g} s: {reason}")

    def give_up(self, stage: str, reason: str) -> None:
        """Have all requests fail, and refuse more, until the stage has a replica."""
        if stage not in self._over_time:
            self._over_time.add(stage)
            self._on_change(StartError(f"no replica of {stage} is left and {reason}"))

"""Which replica takes a request, and when: the queue of one stage, bound to replicas as late as keeps them busy.

A state machine without a clock, threads or I/O: whoever drives it says what happened and when (`now`, seconds of a
clock that never runs backwards), and hears through `Job.on_place` where each job goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from disagg_ray.config.schema import REPLICA_WINDOW
from disagg_ray.scheduling.predictor import Predictor
from disagg_ray.scheduling.queues import Heap, PriorityQueue

OVERDUE_SHARE = 0.1
"""A job that takes longer than predicted is expected to take this much longer than it already has."""


@dataclass(frozen=True)
class Assignment:
    """Where a job is to be."""

    replica: str
    run: bool
    """True: compute there now. False: prefetch its inputs there and wait."""


@dataclass(eq=False)
class Job:
    """One stage's work for one request."""

    request_id: str
    work: float
    """Frames x pixels x steps, or what else seconds grow with."""
    shape: Hashable
    """Jobs of equal shape take equally long on like hardware."""
    priority: int
    """Higher first."""
    sequence: int
    """Order of admission, kept when the job is tried again."""
    on_place: Callable[[Assignment | None], None]
    """Called when its place has changed; with None when the replica it was prefetched on is gone and it waits again.
    May call the scheduler."""
    avoid: frozenset[str] = frozenset()
    """Replicas that failed it: it goes to others as long as the stage has any."""
    place: Assignment | None = None
    """Set by the scheduler alone."""


@dataclass(eq=False)
class _Group:
    """Replicas of like hardware."""

    name: str
    idle: Heap[_Replica] = field(default_factory=Heap)
    """By the time since when."""
    open: Heap[_Replica] = field(default_factory=Heap)
    """Busy and with nothing prefetched, by predicted end."""
    offers: Heap[_Replica] = field(default_factory=Heap)
    """Replicas of the stage with a prefetched job, by what starting that job in this group would gain."""


@dataclass(eq=False)
class _Replica:
    name: str
    group: _Group
    running: Job | None = None
    started: float = 0.0
    end: float = 0.0
    """When the running job began, and is predicted to end."""
    on_idle: Callable[[], None] = lambda: None
    """Of one that retires."""


class StageScheduler:
    """Places the jobs of one stage on its replicas: one computing and one prefetched on each, the rest waiting here.

    The first in the queue goes where it is predicted to finish first, of those replicas that have not failed it if
    there are any. That may be the prefetch place of a fast replica although a slow one is idle; as long as jobs wait
    here that may go there, though, every replica computes. With none waiting, an idle replica takes over a prefetched
    job that it would finish no later, where most time is gained first. A call costs O(groups x log(replicas +
    waiting)), averaged over calls, and as much for each job that waits for another replica than those with room.
    """

    def __init__(self) -> None:
        self._predictor = Predictor()
        self._replicas: dict[str, _Replica] = {}
        self._retiring: dict[str, _Replica] = {}
        """Those that only finish what they run; they stand in no heap."""
        self._groups: dict[str, _Group] = {}
        self._busy: Heap[_Replica] = Heap()
        """By predicted end."""
        self._prefetched: dict[_Replica, Job] = {}
        """Only behind one that runs."""
        self._unoffered: dict[_Replica, None] = {}
        """Those of them that stand in no group's offers, or stand there wrongly, since nobody has looked."""
        self._waiting: PriorityQueue[Job] = PriorityQueue()
        self._waiting_work = 0.0
        self._changed: OrderedDict[Job, Assignment | None] = OrderedDict()
        """Jobs whose place has changed, and the place that they were last told."""
        self._telling = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._busy)

    @property
    def num_prefetched(self) -> int:
        return len(self._prefetched)

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(self._replicas)

    def outstanding_seconds(self, now: float) -> float:
        """Return the replica seconds that all jobs here are predicted to take from now on; linear in the replicas."""
        self._extend_overdue(now)
        running = sum(replica.end - now for replica in self._replicas.values() if replica.running)
        prefetched = sum(self.predict(replica.group.name, job) for replica, job in self._prefetched.items())
        return running + prefetched + self._waiting_work * self._predictor.mean_rate()

    def predict(self, group: str, job: Job) -> float:
        """Return the seconds a job would compute on a replica of a group; 0 as long as nothing is known."""
        return self._predictor.predict(group, job.shape, job.work)

    def expect(self, work: float, shape: Hashable) -> float:
        """Return the seconds such a job would compute on a replica of the stage; 0 as long as nothing is known."""
        rates = [self._predictor.predict(group, shape, work) for group in self._groups]
        return sum(rates) / len(rates) if rates else 0.0

    def add(self, replica: str, group: str, now: float) -> None:
        """Take on a replica that is ready and idle; replicas of one group are like hardware."""
        assert replica not in self._replicas, f"{replica} is there already"
        if group not in self._groups:
            self._groups[group] = _Group(group)
            self._unoffered |= dict.fromkeys(self._prefetched)
        added = self._replicas[replica] = _Replica(replica, self._groups[group])
        added.group.idle.push(added, now)
        for unwelcome in [other for other, job in self._prefetched.items() if other.name in job.avoid]:
            self._wait(self._take_prefetched(unwelcome))
            unwelcome.group.open.push(unwelcome, unwelcome.end)
        self._settle(now)

    def remove(self, replica: str, now: float) -> None:
        """Let go of a replica that died or is drained.

        What it had prefetched waits again in its old order. What it was running is no longer here: `push` it to have
        it run again. Nothing happens if the replica is not here any more, having retired.
        """
        if (retired := self._retiring.pop(replica, None)) is not None:
            if retired.running:
                self._forget(retired.running)
            retired.on_idle()
            return
        if (removed := self._replicas.pop(replica, None)) is None:
            return
        if removed in self._prefetched:
            self._wait(self._take_prefetched(removed))
        if removed.running:
            self._forget(removed.running)
        self._busy.remove(removed)
        removed.group.idle.remove(removed)
        removed.group.open.remove(removed)
        self._settle(now)

    def retire(self, replica: str, now: float, on_idle: Callable[[], None]) -> None:
        """Give a replica nothing more: what it runs it may finish; `on_idle` is called when it runs nothing.

        What it had prefetched waits again in its old order.
        """
        retired = self._replicas[replica]
        if not retired.running:
            self.remove(replica, now)
            on_idle()
            return
        del self._replicas[replica]
        self._retiring[replica], retired.on_idle = retired, on_idle
        if retired in self._prefetched:
            self._wait(self._take_prefetched(retired))
        self._busy.remove(retired)
        retired.group.open.remove(retired)
        self._settle(now)

    def push(self, job: Job, now: float) -> None:
        """Take on a job that is not here."""
        assert job.place is None, f"{job.request_id} has a place already"
        self._wait(job)
        self._settle(now)

    def withdraw(self, job: Job, now: float) -> None:
        """Let go of a job, wherever it is; nothing happens if it is not here.

        One that runs is withdrawn when its replica has let go of it: the next one runs there at once.
        """
        replica = self._replica_of(job)
        if replica is None and self._waiting.remove(job):
            self._count_waiting(-job.work)
        elif replica is not None and replica.running is job:
            self._free(replica, now)
        elif replica is not None:
            self._take_prefetched(replica)
            replica.group.open.push(replica, replica.end)
        self._forget(job)
        self._settle(now)

    def finish(self, job: Job, now: float, seconds: float) -> None:
        """Note that a running job was computed in `seconds`; nothing happens if it is not running (a late answer)."""
        replica = self._replica_of(job)
        if replica is None or replica.running is not job:
            return
        self._predictor.learn(replica.group.name, job.shape, job.work, seconds)
        self._forget(job)
        self._free(replica, now)
        self._settle(now)

    def rebalance(self, now: float) -> None:
        """Look again, as time has passed: a job behind one that takes too long may be better off on an idle replica.

        Every other call does so too; without any, what is predicted changes and nobody acts on it.
        """
        self._settle(now)

    def _settle(self, now: float) -> None:
        """Give every job its place, then tell."""
        self._extend_overdue(now)
        self._place_waiting(now)
        while move := self._best_move(now):
            source, target = move
            job = self._take_prefetched(source)
            source.group.open.push(source, source.end)
            self._run(target, job, now)
        self._tell()

    def _place_waiting(self, now: float) -> None:
        barred, placed_work = [], 0.0
        while self._waiting and self._has_room():
            job = self._waiting.pop()
            replica = self._best_replica(job, now)
            if replica is None:
                barred.append(job)
                continue
            placed_work += job.work
            if replica.running:
                self._prefetch(replica, job)
            else:
                self._run(replica, job, now)
        for job in barred:
            self._waiting.push(job, job.priority, job.sequence)
        if placed_work:
            self._count_waiting(-placed_work)

    def _has_room(self) -> bool:
        return len(self._busy) + len(self._prefetched) < REPLICA_WINDOW * len(self._replicas)

    def _extend_overdue(self, now: float) -> None:
        """Predict anew when jobs end that should have ended; from here on no end lies in the past."""
        while (replica := self._busy.peek()) and replica.end < now:
            assert replica.running is not None
            relearned = replica.started + self.predict(replica.group.name, replica.running)
            self._expect(replica, max(relearned, now + OVERDUE_SHARE * (now - replica.started)))

    def _best_replica(self, job: Job, now: float) -> _Replica | None:
        """Return where a job would finish first; of equals the idle one, and of those the one idle longest.

        None: all that it may go to have their two.
        """
        candidates: list[tuple[float, bool, float, str]] = []
        welcomes = self._welcomes(job)
        for group in self._groups.values():
            if found := group.idle.find(welcomes):
                since, replica = found
                candidates.append((now + self.predict(group.name, job), False, since, replica.name))
            elif found := group.open.find(welcomes):
                end, replica = found
                candidates.append((end + self.predict(group.name, job), True, end, replica.name))
        return self._replicas[min(candidates)[-1]] if candidates else None

    def _welcomes(self, job: Job) -> Callable[[_Replica], bool]:
        """Return what says where a job may go: to any that has not failed it, or, if all have, to any."""
        if sum(name in self._replicas for name in job.avoid) == len(self._replicas):
            return lambda _: True
        return lambda replica: replica.name not in job.avoid

    def _best_move(self, now: float) -> tuple[_Replica, _Replica] | None:
        """Return from which to which replica a prefetched job would gain most by starting now, if any gains."""
        if not self._prefetched or len(self._busy) == len(self._replicas):
            return None
        groups = [group for group in self._groups.values() if group.idle]
        if groups:
            self._offer()
        moves = []
        for group in groups:
            offer = group.offers.find(lambda source, group=group: self._idle_for(source, group) is not None)  # type: ignore[misc]
            if offer is not None and now + offer[0] <= 0:
                target = self._idle_for(offer[1], group)
                assert target is not None
                moves.append((offer[0], offer[1].name, target.name))
        if not moves:
            return None
        _, left, taken = min(moves)
        return self._replicas[left], self._replicas[taken]

    def _idle_for(self, source: _Replica, group: _Group) -> _Replica | None:
        """Return which of a group's idle replicas may take over what another has prefetched."""
        found = group.idle.find(self._welcomes(self._prefetched[source]))
        return found[1] if found else None

    def _offer(self) -> None:
        """Let idle replicas see what is prefetched, by the predictions of now.

        The key is the negative time until which starting it in a group finishes it no later than where it is.
        """
        for replica in self._unoffered:
            job = self._prefetched[replica]
            here = self.predict(replica.group.name, job)
            for group in self._groups.values():
                group.offers.push(replica, self.predict(group.name, job) - here - replica.end)
        self._unoffered.clear()

    def _prefetch(self, replica: _Replica, job: Job) -> None:
        self._prefetched[replica] = job
        self._unoffered[replica] = None
        replica.group.open.remove(replica)
        self._place(job, Assignment(replica.name, run=False))

    def _take_prefetched(self, replica: _Replica) -> Job:
        self._unoffered.pop(replica, None)
        for group in self._groups.values():
            group.offers.remove(replica)
        return self._prefetched.pop(replica)

    def _run(self, replica: _Replica, job: Job, now: float) -> None:
        """Start a job on an idle replica."""
        replica.group.idle.remove(replica)
        replica.running, replica.started = job, now
        self._expect(replica, now + self.predict(replica.group.name, job))
        self._place(job, Assignment(replica.name, run=True))

    def _free(self, replica: _Replica, now: float) -> None:
        """Go on with what is prefetched, or be idle."""
        replica.running = None
        if replica.name in self._retiring:
            del self._retiring[replica.name]
            replica.on_idle()
            return
        self._busy.remove(replica)
        replica.group.open.remove(replica)
        if replica in self._prefetched:
            self._run(replica, self._take_prefetched(replica), now)
        else:
            replica.group.idle.push(replica, now)

    def _expect(self, replica: _Replica, end: float) -> None:
        """Predict when a replica's running job ends."""
        replica.end = end
        self._busy.push(replica, end)
        if replica in self._prefetched:
            self._unoffered[replica] = None
        else:
            replica.group.open.push(replica, end)

    def _replica_of(self, job: Job) -> _Replica | None:
        if job.place is None:
            return None
        return self._replicas.get(job.place.replica) or self._retiring[job.place.replica]

    def _wait(self, job: Job) -> None:
        self._waiting.push(job, job.priority, job.sequence)
        self._count_waiting(job.work)
        self._place(job, None)

    def _count_waiting(self, work: float) -> None:
        self._waiting_work = self._waiting_work + work if self._waiting else 0.0  # no rounding error outlives the queue

    def _forget(self, job: Job) -> None:
        job.place = None
        self._changed.pop(job, None)

    def _place(self, job: Job, place: Assignment | None) -> None:
        self._changed.setdefault(job, job.place)
        job.place = place

    def _tell(self) -> None:
        """Call back about each job that is elsewhere than it knows; what callbacks change is told after them."""
        if self._telling:
            return
        self._telling = True
        try:
            while self._changed:
                job, told = self._changed.popitem(last=False)
                if job.place is not told:
                    job.on_place(job.place)
        finally:
            self._telling = False

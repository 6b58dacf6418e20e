"""Which replica takes a request, and when: the queue of one stage, bound to replicas as late as keeps them busy.

A state machine without a clock, threads or I/O: its caller says what happened and when (`now`, seconds of a clock that
never runs backwards), and learns through `Job.on_place` where each job is assigned. Each call looks at every replica
and every waiting job: a thousand of the former and hundreds of the latter cost less than a millisecond (`queues`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter

from disagg_ray.scheduling.job import Assignment, Job
from disagg_ray.scheduling.predictor import Predictor
from disagg_ray.scheduling.queues import PriorityQueue

OVERDUE_SHARE = 0.1
"""A job that takes longer than predicted is expected to take this much longer than it already has."""


@dataclass(eq=False)
class _Replica:
    name: str
    group: str
    """Of like hardware."""
    free_at: float
    """When its running job is predicted to end; of an idle one, when it became idle."""
    started: float = 0.0
    """When its running job began."""
    running: Job | None = None
    prefetched: Job | None = None
    """Only behind one that runs."""
    on_idle: Callable[[], None] = lambda: None
    """Of one that retires."""


class StageScheduler:
    """Places the jobs of one stage on its replicas: one computing and one prefetched on each, the rest waiting here.

    The first in the queue goes where it is predicted to finish first, of those replicas that have not failed it if
    there are any. That may be the prefetch place of a fast replica although a slow one is idle; as long as jobs wait
    here that may go there, though, every replica computes. With none waiting, an idle replica takes over a prefetched
    job that it would finish no later, where most time is gained first.
    """

    def __init__(self) -> None:
        self._predictor = Predictor()
        self._replicas: dict[str, _Replica] = {}
        self._retiring: dict[str, _Replica] = {}
        """Those that only finish what they run."""
        self._groups: dict[str, None] = {}
        """Of all replicas so far."""
        self._waiting: PriorityQueue[Job] = PriorityQueue()
        self._moved: dict[Job, Assignment | None] = {}
        """Jobs whose place has changed, and the place that `on_place` was called with last."""
        self._notifying = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(replica.running is not None for replica in self._replicas.values())

    @property
    def num_prefetched(self) -> int:
        return sum(replica.prefetched is not None for replica in self._replicas.values())

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(self._replicas)

    def outstanding_seconds(self, now: float) -> float:
        """Return the replica seconds that all jobs here are predicted to take from now on."""
        self._extend_overdue(now)
        placed = 0.0
        for replica in self._replicas.values():
            if replica.running is not None:
                placed += replica.free_at - now
            if replica.prefetched is not None:
                placed += self.predict(replica.group, replica.prefetched)
        return placed + sum(job.work for job in self._waiting) * self._predictor.mean_rate()

    def predict(self, group: str, job: Job) -> float:
        """Return the seconds a job would compute on a replica of a group; 0 as long as nothing is known."""
        return self._predictor.predict(group, job.shape, job.work)

    def expect(self, work: float, shape: Hashable) -> float:
        """Return the seconds such a job would compute on a replica of the stage; 0 as long as nothing is known."""
        seconds = [self._predictor.predict(group, shape, work) for group in self._groups]
        return sum(seconds) / len(seconds) if seconds else 0.0

    def add(self, replica: str, group: str, now: float) -> None:
        """Take on a replica that is ready and idle; replicas of one group are like hardware."""
        assert replica not in self._replicas, f"{replica} is there already"
        self._groups[group] = None
        self._replicas[replica] = _Replica(replica, group, free_at=now)
        for other in self._replicas.values():
            if other.prefetched is not None and other.name in other.prefetched.avoid:
                self._requeue_prefetched(other)
        self._settle(now)

    def remove(self, replica: str, now: float) -> None:
        """Drop a replica that died or is drained.

        What it had prefetched waits again in its old order. What it was running is no longer here: `push` it to have
        it run again. Nothing happens if the replica is not here any more, having retired.
        """
        removed = self._retiring.pop(replica, None) or self._replicas.pop(replica, None)
        if removed is None:
            return
        if removed.running is not None:
            self._forget(removed.running)
        self._requeue_prefetched(removed)
        removed.on_idle()
        self._settle(now)

    def retire(self, replica: str, now: float, on_idle: Callable[[], None]) -> None:
        """Give a replica nothing more: what it runs it may finish; `on_idle` is called when it runs nothing.

        What it had prefetched waits again in its old order.
        """
        retired = self._retiring[replica] = self._replicas.pop(replica)
        retired.on_idle = on_idle
        if retired.running is None:
            self.remove(replica, now)
            return
        self._requeue_prefetched(retired)
        self._settle(now)

    def push(self, job: Job, now: float) -> None:
        """Take on a job that is not here."""
        assert job.place is None, f"{job.request_id} has a place already"
        self._wait(job)
        self._settle(now)

    def withdraw(self, job: Job, now: float) -> None:
        """Drop a job, wherever it is; nothing happens if it is not here.

        One that runs is withdrawn when its replica no longer works at it: the next one runs there at once.
        """
        replica = self._replica_of(job)
        if replica is None:
            self._waiting.remove(job)
        elif replica.running is job:
            self._free(replica, now)
        else:
            replica.prefetched = None
        self._forget(job)
        self._settle(now)

    def finish(self, job: Job, now: float, seconds: float) -> None:
        """Note that a running job was computed in `seconds`; nothing happens if it is not running (a late answer)."""
        replica = self._replica_of(job)
        if replica is None or replica.running is not job:
            return
        self._predictor.learn(replica.group, job.shape, job.work, seconds)
        self._forget(job)
        self._free(replica, now)
        self._settle(now)

    def _settle(self, now: float) -> None:
        """Give every job its place, then notify."""
        self._extend_overdue(now)
        self._place_waiting(now)
        while move := self._best_move(now):
            _, source, job, target = move
            source.prefetched = None
            self._run(target, job, now)
            self._place_waiting(now)  # one may have waited for this source alone
        self._notify()

    def _extend_overdue(self, now: float) -> None:
        """Predict anew when jobs end that should have ended; from here on every predicted end is in the future."""
        for replica in self._replicas.values():
            if replica.running is not None and replica.free_at < now:
                relearned = replica.started + self.predict(replica.group, replica.running)
                replica.free_at = max(relearned, now + OVERDUE_SHARE * (now - replica.started))

    def _place_waiting(self, now: float) -> None:
        barred = []
        while self._waiting and (with_room := [r for r in self._replicas.values() if r.prefetched is None]):
            job = self._waiting.pop()
            replica = self._fastest(job, with_room, now)
            if replica is None:
                barred.append(job)
            elif replica.running is None:
                self._run(replica, job, now)
            else:
                replica.prefetched = job
                self._place(job, Assignment(replica.name, run=False))
        for job in barred:
            self._waiting.push(job, job.priority, job.sequence)

    def _fastest(self, job: Job, replicas: Sequence[_Replica], now: float) -> _Replica | None:
        """Return where a job would finish first; of equals the idle one, and of those the one idle longest.

        None: it may go to none of these.
        """
        seconds = {group: self.predict(group, job) for group in self._groups}
        return min(
            self._allowed(job, replicas),
            key=lambda r: (max(now, r.free_at) + seconds[r.group], r.running is not None, r.free_at),
            default=None,
        )

    def _allowed(self, job: Job, replicas: Sequence[_Replica]) -> Sequence[_Replica]:
        """Return those replicas that have not failed a job, or all where every replica of the stage has."""
        if not job.avoid or job.avoid.issuperset(self._replicas):
            return replicas
        return [replica for replica in replicas if replica.name not in job.avoid]

    def _best_move(self, now: float) -> tuple[float, _Replica, Job, _Replica] | None:
        """Return the prefetched job that gains most by starting now on an idle replica, if any loses nothing.

        Returns the seconds it gains, its replica, itself and the idle replica.
        """
        prefetching = [replica for replica in self._replicas.values() if replica.prefetched is not None]
        idle = [replica for replica in self._replicas.values() if replica.running is None]
        if not prefetching or not idle:
            return None
        idle.sort(key=attrgetter("free_at"), reverse=True)
        idle_longest = list({replica.group: replica for replica in idle}.values())
        moves = []
        for source in prefetching:
            job = source.prefetched
            assert job is not None
            there_s = self.predict(source.group, job)
            for target in self._allowed(job, idle if job.avoid else idle_longest):
                gain = source.free_at - now + (there_s - self.predict(target.group, job))  # 0 for one of like hardware
                moves.append((gain, source, job, target))
        best = max(moves, key=itemgetter(0), default=None)
        return best if best is not None and best[0] >= 0.0 else None

    def _run(self, replica: _Replica, job: Job, now: float) -> None:
        """Start a job on an idle replica."""
        replica.running, replica.started = job, now
        replica.free_at = now + self.predict(replica.group, job)
        self._place(job, Assignment(replica.name, run=True))

    def _free(self, replica: _Replica, now: float) -> None:
        """Run what is prefetched, or become idle."""
        replica.running, replica.free_at = None, now
        if self._retiring.pop(replica.name, None):
            replica.on_idle()
        elif replica.prefetched is not None:
            job, replica.prefetched = replica.prefetched, None
            self._run(replica, job, now)

    def _requeue_prefetched(self, replica: _Replica) -> None:
        if replica.prefetched is not None:
            self._wait(replica.prefetched)
            replica.prefetched = None

    def _replica_of(self, job: Job) -> _Replica | None:
        if job.place is None:
            return None
        return self._replicas.get(job.place.replica) or self._retiring[job.place.replica]

    def _wait(self, job: Job) -> None:
        self._waiting.push(job, job.priority, job.sequence)
        self._place(job, None)

    def _forget(self, job: Job) -> None:
        job.place = None
        self._moved.pop(job, None)

    def _place(self, job: Job, place: Assignment | None) -> None:
        self._moved.setdefault(job, job.place)
        job.place = place

    def _notify(self) -> None:
        """Call `on_place` of each job whose place is another than at its last call; calls made meanwhile come last."""
        if self._notifying:
            return
        self._notifying = True
        try:
            while self._moved:
                job = next(iter(self._moved))
                if self._moved.pop(job) != job.place:
                    job.on_place(job.place)
        finally:
            self._notifying = False

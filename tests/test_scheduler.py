"""Which replica takes a job, and when."""

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg_ray.scheduling.job import Assignment, Job
from disagg_ray.scheduling.scheduler import StageScheduler

SPEEDS = {"fast": 1.0, "slow": 4.0}
"""Seconds per unit of work, by group."""


def make_jobs(count: int = 1, work: float = 1.0, told: list[tuple[str, Assignment | None]] | None = None) -> list[Job]:
    """Return jobs 0, 1, ... of equal size; what they are told is noted."""
    notes = [] if told is None else told
    return [Job(n := str(i), work, work, 0, i, lambda place, n=n: notes.append((n, place))) for i in range(count)]


def start(groups: str, jobs: list[Job] = (), learned: bool = True) -> StageScheduler:
    """Return a scheduler with replicas `fast0 slow0 slow1` for groups "fast slow slow" and with jobs, at time 0."""
    scheduler, counts = StageScheduler(), Counter()
    if learned:
        for group, seconds in SPEEDS.items():
            scheduler.add("first", group, 0.0)
            scheduler.push(job := make_jobs()[0], 0.0)
            scheduler.finish(job, 0.0, seconds)
            scheduler.remove("first", 0.0)
    for group in groups.split():
        scheduler.add(f"{group}{counts[group]}", group, 0.0)
        counts[group] += 1
    for job in jobs:
        scheduler.push(job, 0.0)
    return scheduler


def places(jobs: list[Job]) -> str:
    """Say where jobs are: `fast0!` runs, `fast0` is prefetched, `-` waits."""
    return " ".join(f"{job.place.replica}{'!' if job.place.run else ''}" if job.place else "-" for job in jobs)


def look_again(scheduler: StageScheduler, now: float) -> None:
    """Have a scheduler look at its replicas as of now, by a call that is about none of its jobs."""
    scheduler.withdraw(make_jobs()[0], now)


def counts(scheduler: StageScheduler) -> tuple[int, int, int]:
    return scheduler.num_waiting, scheduler.num_running, scheduler.num_prefetched


def test_each_replica_runs_one_and_prefetches_one_and_the_rest_wait():
    scheduler = start("fast fast", jobs := make_jobs(6))
    assert places(jobs) == "fast0! fast1! fast0 fast1 - -"
    assert counts(scheduler) == (2, 2, 2)


def test_jobs_wait_until_a_replica_comes():
    scheduler = start("", jobs := make_jobs(2))
    assert counts(scheduler) == (2, 0, 0)
    scheduler.add("late", "fast", 1.0)
    assert places(jobs) == "late! late"


def test_what_is_prefetched_runs_when_the_job_before_it_is_done_and_the_next_is_prefetched():
    told = []
    scheduler = start("fast", jobs := make_jobs(3, told=told))
    scheduler.finish(jobs[0], 1.0, 1.0)
    assert places(jobs) == "- fast0! fast0"
    assert told == [
        ("0", Assignment("fast0", run=True)), ("1", Assignment("fast0", run=False)),
        ("1", Assignment("fast0", run=True)), ("2", Assignment("fast0", run=False)),
    ]  # fmt: skip


def test_the_faster_of_two_idle_replicas_takes_the_job():
    start("slow fast", jobs := make_jobs(1))
    assert places(jobs) == "fast0!"


def test_a_job_waits_for_a_fast_replica_where_that_finishes_it_before_an_idle_slow_one():
    start("slow fast", jobs := make_jobs(3))
    assert places(jobs) == "fast0! fast0 slow0!"


def test_of_equals_the_replica_idle_longest_takes_the_job():
    scheduler = start("fast fast", jobs := make_jobs(3))
    scheduler.finish(jobs[1], 1.0, 1.0)  # fast1 takes over what fast0 has prefetched
    scheduler.finish(jobs[0], 2.0, 1.0)
    scheduler.finish(jobs[2], 3.0, 1.0)
    scheduler.push(jobs[1], 4.0)
    assert places(jobs) == "- fast0! -"


def test_the_replica_with_the_least_time_left_prefetches():
    scheduler = start("fast fast")
    long, short, job = make_jobs(1, 9.0) + make_jobs(1, 5.0) + make_jobs(1)
    for each in (long, short, job):
        scheduler.push(each, 0.0)
    assert places([long, short, job]) == "fast0! fast1! fast1"


def test_an_overdue_replica_is_expected_to_take_a_tenth_more():
    scheduler = start("fast fast")
    overdue, ending, job = make_jobs(1, 10.0) + make_jobs(1, 10.0) + make_jobs(1)
    scheduler.push(overdue, 0.0)
    scheduler.push(ending, 1.5)
    assert scheduler.outstanding_seconds(10.5) == pytest.approx(0.1 * 10.5 + 1.0)
    scheduler.push(job, 10.5)  # fast0 is now expected at 11.55, fast1 still at 11.5
    assert places([overdue, ending, job]) == "fast0! fast1! fast1"


def test_an_idle_replica_takes_over_what_another_has_prefetched():
    told = []
    scheduler = start("fast fast", jobs := make_jobs(3, told=told))
    assert places(jobs) == "fast0! fast1! fast0"
    scheduler.finish(jobs[1], 1.0, 1.0)
    assert places(jobs) == "fast0! - fast1!"
    assert told[-1] == ("2", Assignment("fast1", run=True))
    scheduler.push(jobs[1], 1.0)
    assert places(jobs) == "fast0! fast0 fast1!"


def test_of_prefetched_jobs_the_one_with_the_longest_wait_is_taken_over():
    scheduler = start("fast fast")
    running, prefetched = make_jobs(1, 5.0) + make_jobs(1, 9.0), make_jobs(2)
    for job in running + prefetched:
        scheduler.push(job, 0.0)
    assert places(running + prefetched) == "fast0! fast1! fast0 fast1"
    scheduler.add("fast2", "fast", 1.0)
    assert places(prefetched) == "fast0 fast2!"


def test_a_slow_replica_leaves_a_prefetched_job_that_the_fast_one_finishes_earlier():
    scheduler = start("fast", jobs := make_jobs(2))
    scheduler.add("slow0", "slow", 0.0)
    assert places(jobs) == "fast0! fast0"


def test_a_slow_replica_takes_over_when_the_fast_one_takes_too_long():
    scheduler = start("fast slow", jobs := make_jobs(2))
    assert places(jobs) == "fast0! fast0"
    look_again(scheduler, 2.0)
    assert places(jobs) == "fast0! fast0"
    look_again(scheduler, 40.0)  # another 4 seconds and 1 against 4
    assert places(jobs) == "fast0! slow0!"


def test_a_fast_replica_takes_over_from_a_slow_one_and_not_the_other_way():
    scheduler = start("slow", jobs := make_jobs(2))
    scheduler.add("fast0", "fast", 3.9)
    assert places(jobs) == "slow0! fast0!"


def test_nothing_known_spreads_over_idle_replicas_first():
    start("slow fast slow", jobs := make_jobs(4), learned=False)
    assert sorted(places(jobs[:3]).split()) == ["fast0!", "slow0!", "slow1!"]
    assert not jobs[3].place.run


def test_what_is_learned_decides():
    scheduler = start("slow fast", jobs := make_jobs(2), learned=False)
    for job in jobs:
        scheduler.finish(job, 1.0, SPEEDS[job.place.replica[:-1]])
    scheduler.push(jobs[0], 2.0)
    assert (places(jobs[:1]), scheduler.predict("slow", jobs[0])) == ("fast0!", 4.0)


def test_a_lost_replica_gives_back_what_it_had_prefetched_at_its_old_place():
    told = []
    scheduler = start("fast", jobs := make_jobs(4, told=told))
    scheduler.remove("fast0", 1.0)
    assert (places(jobs), told[-1]) == ("- - - -", ("1", None))
    assert (counts(scheduler), scheduler.replicas) == ((3, 0, 0), ())
    scheduler.add("new", "fast", 2.0)
    assert places(jobs) == "- new! new -"
    scheduler.push(jobs[0], 2.0)
    scheduler.finish(jobs[1], 3.0, 1.0)
    assert places(jobs) == "new - new! -"


def test_a_prefetched_job_that_moves_at_once_is_told_only_its_new_place():
    told = []
    scheduler = start("fast fast", jobs := make_jobs(3, told=told))
    scheduler.withdraw(jobs[1], 0.5)
    assert places(jobs) == "fast0! - fast1!"
    scheduler.remove("fast0", 1.0)
    scheduler.push(jobs[1], 1.0)
    scheduler.add("fast2", "fast", 1.0)
    del told[:]
    scheduler.push(jobs[0], 1.0)
    scheduler.remove("fast1", 1.0)
    assert (places(jobs), told) == (
        "fast2 fast2! -",
        [("0", Assignment("fast1", run=False)), ("0", Assignment("fast2", run=False))],
    )


def test_withdrawing_frees_the_place_wherever_the_job_is_and_twice_is_nothing():
    told = []
    scheduler = start("fast", jobs := make_jobs(5, told=told))
    del told[:]
    for job in (jobs[3], jobs[1], jobs[0], jobs[0]):
        scheduler.withdraw(job, 1.0)
    assert places(jobs) == "- - fast0! - fast0"
    assert {name for name, _ in told} == {"2", "4"}
    assert counts(scheduler) == (0, 1, 1)


def test_a_late_answer_changes_nothing():
    scheduler = start("fast", jobs := make_jobs(2))
    scheduler.withdraw(jobs[0], 1.0)
    scheduler.finish(jobs[0], 2.0, 999.0)
    assert (places(jobs), scheduler.predict("fast", jobs[0])) == ("- fast0!", 1.0)


def test_urgent_jobs_go_first_and_patient_ones_still_come():
    scheduler, told = StageScheduler(), []
    jobs = make_jobs(40, told=told)
    for job in jobs[1:]:
        job.priority = 9
    for job in jobs:
        scheduler.push(job, 0.0)
    scheduler.add("fast0", "fast", 0.0)
    while running := [job for job in jobs if job.place and job.place.run]:
        scheduler.finish(running[0], 0.0, 1.0)
    ran = [name for name, place in told if place.run]
    assert ran.index("0") == 7 and sorted(ran) == sorted(job.request_id for job in jobs)


def test_outstanding_seconds_count_what_runs_is_prefetched_and_waits():
    scheduler = start("fast", jobs := make_jobs(4))
    scheduler.withdraw(jobs[3], 0.0)
    assert scheduler.outstanding_seconds(0.25) == pytest.approx(0.75 + 1.0 + (1.0 + 4.0) / 2)


def test_a_callback_may_call_the_scheduler():
    scheduler, order = StageScheduler(), []

    def finish_at_once(job: Job, place: Assignment | None) -> None:
        order.append((job.request_id, place.run))
        if place.run:
            scheduler.finish(job, 0.0, 1.0)

    jobs = make_jobs(3)
    for job in jobs:
        job.on_place = lambda place, job=job: finish_at_once(job, place)
        scheduler.push(job, 0.0)
    scheduler.add("fast0", "fast", 0.0)
    assert order == [("0", True), ("1", True), ("2", True)]
    assert counts(scheduler) == (0, 0, 0)


@pytest.mark.parametrize("withdraw", [False, True])
def test_what_a_callback_changes_is_told_after_it_and_not_to_jobs_withdrawn_in_it(withdraw):
    order = []
    scheduler = start("fast", jobs := make_jobs(3, told=order))

    def lose_the_other_replica(place: Assignment | None) -> None:
        scheduler.remove("fast0", 1.0)
        if withdraw:
            scheduler.withdraw(jobs[1], 1.0)
        order.append("lost")

    jobs[2].on_place = lose_the_other_replica
    del order[:]
    scheduler.add("fast1", "fast", 1.0)
    assert order == (["lost"] if withdraw else ["lost", ("1", Assignment("fast1", run=False))])


def test_a_callback_that_fails_leaves_the_others_to_be_told():
    scheduler, told = StageScheduler(), []
    jobs = make_jobs(2, told=told)
    jobs[0].on_place = lambda place: 1 / 0
    for job in jobs:
        scheduler.push(job, 0.0)
    with pytest.raises(ZeroDivisionError):
        scheduler.add("fast0", "fast", 0.0)
    look_again(scheduler, 0.0)
    assert told == [("1", Assignment("fast0", run=False))]


def test_a_replica_that_retires_finishes_what_it_runs_and_gets_nothing_more():
    scheduler = start("fast slow", jobs := make_jobs(4))
    gone = []
    scheduler.retire("fast0", 0.5, lambda: gone.append("fast0"))
    assert (places(jobs), gone) == ("fast0! - slow0! slow0", [])
    scheduler.finish(jobs[0], 1.0, 1.0)
    assert (places(jobs), gone) == ("- - slow0! slow0", ["fast0"])


def test_a_replica_that_is_idle_retires_at_once():
    scheduler, gone = start("fast"), []
    scheduler.retire("fast0", 0.0, lambda: gone.append("fast0"))
    scheduler.remove("fast0", 1.0)
    assert (gone, scheduler.replicas) == (["fast0"], ())


def test_a_job_goes_to_a_replica_that_has_not_failed_it():
    scheduler = start("fast fast", jobs := make_jobs(2))
    scheduler.withdraw(jobs[0], 0.0)
    jobs[0].avoid = frozenset({"fast0"})
    scheduler.push(jobs[0], 0.0)
    assert places(jobs) == "fast1 fast1!"
    third, fourth = make_jobs(2)
    third.avoid = jobs[0].avoid
    scheduler.push(third, 0.0)
    scheduler.push(fourth, 0.0)
    assert (places([third, fourth]), counts(scheduler)) == ("- fast0!", (1, 2, 1))
    scheduler.finish(jobs[1], 1.0, 1.0)
    assert places([jobs[0], third, fourth]) == "fast1! fast1 fast0!"


def test_a_job_that_every_replica_failed_may_go_to_any():
    job, *_ = jobs = make_jobs(2)
    job.avoid = frozenset({"fast0", "fast1", "gone"})
    start("fast fast", jobs)
    assert places(jobs) == "fast0! fast1!"


def test_a_job_leaves_the_prefetch_place_of_a_replica_that_failed_it_when_another_comes():
    scheduler = start("fast", jobs := make_jobs(1))
    (job,) = make_jobs(1)
    job.avoid = frozenset({"fast0"})
    scheduler.push(job, 0.0)
    assert places([job]) == "fast0"
    scheduler.add("slow0", "slow", 0.0)
    assert places([*jobs, job]) == "fast0! slow0!"


def test_one_that_waits_for_a_single_replica_gets_the_place_that_a_move_frees():
    scheduler = start("fast fast", jobs := make_jobs(3))
    jobs.append(Job("3", 1.0, 1.0, 0, 3, lambda _: None, avoid=frozenset({"fast1"})))
    scheduler.push(jobs[3], 0.0)
    assert places(jobs) == "fast0! fast1! fast0 -"
    scheduler.finish(jobs[1], 0.0, 1.0)
    assert places(jobs) == "fast0! - fast1! fast0"


class AnyOrderOfEvents(RuleBasedStateMachine):
    """A driver that pushes, finishes, withdraws, adds and removes in any order, and believes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = StageScheduler()
        self.now = 0.0
        self.numbers = itertools.count()
        self.groups: dict[str, str] = {}
        self.jobs: dict[Job, Assignment | None] = {}
        """Those that are with the scheduler, and where they were last told to be."""
        self.retiring: set[str] = set()

    def running(self, replica: str) -> Job | None:
        return next((job for job, place in self.jobs.items() if place == Assignment(replica, run=True)), None)

    def some_job(self, number: int) -> Job:
        return list(self.jobs)[number % len(self.jobs)]

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(group=st.sampled_from(["fast", "middle", "slow"]))
    def add(self, group):
        name = f"{group}{next(self.numbers)}"
        self.groups[name] = group
        self.scheduler.add(name, group, self.now)

    @precondition(lambda self: self.groups)
    @rule(number=st.integers(0))
    def remove(self, number):
        name = list(self.groups)[number % len(self.groups)]
        del self.groups[name]
        running = self.running(name)
        self.jobs.pop(running, None)
        self.scheduler.remove(name, self.now)
        if running and number % 2:
            self.admit(running)

    @precondition(lambda self: self.groups)
    @rule(number=st.integers(0))
    def retire(self, number):
        name = list(self.groups)[number % len(self.groups)]
        del self.groups[name]
        self.retiring.add(name)
        self.scheduler.retire(name, self.now, lambda: self.retiring.remove(name))

    @precondition(lambda self: self.retiring)
    @rule()
    def lose_a_retiring_one(self):
        name = min(self.retiring)
        del self.jobs[self.running(name)]
        self.scheduler.remove(name, self.now)

    @rule(work=st.sampled_from([0.0, 1.0, 2.0, 50.0]), priority=st.integers(0, 2))
    def push(self, work, priority):
        number = next(self.numbers)
        self.admit(self.make_job(number, work, priority))

    def make_job(self, number: int, work: float, priority: int, avoid: frozenset[str] = frozenset()) -> Job:
        return (job := Job(str(number), work, work, priority, number, lambda place: self.move(job, place), avoid))

    def move(self, job: Job, place: Assignment | None) -> None:
        assert place is None or place.replica not in job.avoid or set(self.groups) <= job.avoid
        self.jobs[job] = place

    def admit(self, job: Job) -> None:
        self.jobs[job] = None
        self.scheduler.push(job, self.now)

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0))
    def withdraw(self, number):
        job = self.some_job(number)
        del self.jobs[job]
        self.scheduler.withdraw(job, self.now)
        self.scheduler.withdraw(job, self.now)

    @precondition(lambda self: any(place and place.run for place in self.jobs.values()))
    @rule(number=st.integers(0), seconds=st.sampled_from([0.0, 0.5, 3.0, 100.0]))
    def finish(self, number, seconds):
        running = [job for job, place in self.jobs.items() if place and place.run]
        job = running[number % len(running)]
        del self.jobs[job]
        self.now += seconds
        self.scheduler.finish(job, self.now, seconds)

    @precondition(lambda self: any(place and place.run for place in self.jobs.values()))
    @rule(number=st.integers(0))
    def fail(self, number):
        running = [job for job, place in self.jobs.items() if place and place.run]
        job = running[number % len(running)]
        avoid = job.avoid | {job.place.replica}
        del self.jobs[job]
        self.scheduler.withdraw(job, self.now)
        self.admit(self.make_job(job.sequence, job.work, job.priority, avoid))

    def may_go(self, job: Job, replica: str) -> bool:
        return replica not in job.avoid or set(self.groups) <= job.avoid

    @invariant()
    def every_job_is_where_the_driver_was_told(self):
        assert all(job.place == place for job, place in self.jobs.items())
        known = [place.run for place in self.staying() if place]
        assert counts(self.scheduler) == (len(self.staying()) - len(known), known.count(True), known.count(False))

    def staying(self) -> list[Assignment | None]:
        """Return the places of jobs, but for those on replicas that retire."""
        return [place for place in self.jobs.values() if not place or place.replica not in self.retiring]

    @invariant()
    def a_replica_retires_only_while_it_runs(self):
        assert all(self.running(name) for name in self.retiring)
        assert not any(place and place.replica in self.retiring and not place.run for place in self.jobs.values())

    @invariant()
    def a_replica_has_one_to_run_and_behind_it_one_prefetched(self):
        taken = Counter(place for place in self.staying() if place)
        assert all(count == 1 for count in taken.values())
        assert {place.replica for place in taken} <= set(self.groups) == set(self.scheduler.replicas)
        assert all(Assignment(place.replica, run=True) in taken for place in taken)

    @invariant()
    def no_place_is_free_while_jobs_wait_that_may_go_there(self):
        taken = Counter(place.replica for place in self.staying() if place)
        free = [name for name in self.groups if taken[name] < 2]
        waiting = [job for job, place in self.jobs.items() if place is None]
        assert not any(self.may_go(job, name) for job in waiting for name in free)

    @invariant()
    def none_is_prefetched_beside_an_idle_replica_of_like_hardware_or_at_one_that_failed_it(self):
        idle = {name: group for name, group in self.groups.items() if not self.running(name)}
        for job, place in self.jobs.items():
            if place and not place.run:
                like = [name for name, group in idle.items() if group == self.groups[place.replica]]
                assert self.may_go(job, place.replica) and not any(self.may_go(job, name) for name in like)

    @invariant()
    def nothing_is_outstanding_only_when_nothing_is_left(self):
        outstanding = self.scheduler.outstanding_seconds(self.now)
        assert outstanding >= 0.0 if self.staying() else outstanding == 0.0

    def teardown(self):
        if not self.groups:
            self.add("fast")
        while self.jobs:
            self.finish(0, 1.0)
        assert counts(self.scheduler) == (0, 0, 0)


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=80, stateful_step_count=60)

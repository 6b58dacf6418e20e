"""How much room pools have, and that requests go on when some are full."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from unittest.mock import patch

import pytest
from helpers import connect_stages, wait_until
from hypothesis import given
from hypothesis import strategies as st

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import REPLICA_WINDOW
from disagg_ray.errors import ConfigError
from disagg_ray.graph import build_graph
from disagg_ray.planning.layouts import CPU, Layout, Seat, Stages
from disagg_ray.planning.predict import Hardware, Predictor
from disagg_ray.planning.profile import VERSION, Load, Point, Profile, StageProfile
from disagg_ray.replica.actor import Replica
from disagg_ray.replica.messages import ReplicaInfo, Task
from disagg_ray.replica.sizing import driver_pool_bytes, enough_for, most_in_flight, num_rooms, pool_bytes
from disagg_ray.replica.stage import Stage
from disagg_ray.request import Request, resolve
from disagg_ray.scheduling.job import Assignment, Job
from disagg_ray.scheduling.scheduler import StageScheduler
from disagg_ray.transfer.handoff import AttemptKey
from disagg_ray.transfer.pool import Pool

INPUTS = {"text": (), "image": (), "denoise": ("text", "image"), "decode": ("denoise",)}
SPENT_BY = {"text": "denoise", "image": "denoise", "denoise": "decode", "decode": "decode"}
"""A stage's output is released when this one is done."""


@pytest.mark.parametrize(
    ("in_flight", "replicas", "last", "rooms"),
    [(6, 1, False, 6), (12, 4, False, 8), (2000, 990, False, 8), (2000, 2, False, 2000), (2000, 4, True, 4)],
)
def test_a_replica_has_room_for_twice_its_share(in_flight: int, replicas: int, last: bool, rooms: int) -> None:
    assert num_rooms(in_flight, replicas, last=last) == rooms


@given(st.integers(1, 1000), st.integers(0, 1000))
def test_half_of_a_stage_has_room_for_all_that_is_in_flight(replicas: int, others: int) -> None:
    in_flight = REPLICA_WINDOW * (replicas + others)
    rooms = num_rooms(in_flight, replicas, last=False)
    assert rooms >= 2
    assert -(-replicas // 2) * rooms >= in_flight


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return connect_stages(load_config("conf/tiny_t2v.yaml"))


def test_a_stage_that_scales_has_room_for_when_it_is_smallest(stages: dict[str, Stage]) -> None:
    scaled, fixed = (
        load_config("conf/tiny_t2v.yaml", "stages.transformer.replicas=9", f"stages.encoder.replicas={replicas}")
        for replicas in ("{min: 2, max: 9}", "9")
    )
    assert pool_bytes(scaled, stages["encoder"]) > pool_bytes(fixed, stages["encoder"])


def test_the_driver_has_room_for_a_stage_when_it_is_largest(stages: dict[str, Stage]) -> None:
    graph, geometry = build_graph([stage.ports for stage in stages.values()]), stages["decoder"].geometry
    scaled, fixed = (
        load_config("conf/tiny_t2v.yaml", f"stages.transformer.replicas={replicas}")
        for replicas in ("{min: 2, max: 9}", "9")
    )
    assert driver_pool_bytes(scaled, graph, geometry) == driver_pool_bytes(fixed, graph, geometry)


def test_a_plan_counts_the_pools_that_stages_make(stages: dict[str, Stage]) -> None:
    counts = {"encoder": 3, "transformer": 9, "decoder": 4}
    config = load_config("conf/tiny_t2v.yaml", *(f"stages.{name}.replicas={count}" for name, count in counts.items()))
    layout = Layout("apart", tuple(Seat(CPU, count, (name,)) for name, count in counts.items()))
    load = Load(64, 64, 9, 8)
    needs = {name: stage.needs() for name, stage in stages.items()}
    profiles = [
        StageProfile(name, False, 0.0, 0, needs[name].input_bytes, needs[name].output_bytes, stage.cache_bytes,
                     (Point(load, 0.0, 0.0, 0.0, 0, 0),))
        for name, stage in stages.items()
    ]  # fmt: skip
    cores = Hardware(CPU, 16, 0, Profile(VERSION, CPU, "", 0, "exact", {}, "", "mp4", 1.0, tuple(profiles)))
    predictor = Predictor({CPU: cores}, Stages(tuple(counts), "transformer"), load)
    for seat in layout.seats:
        assert predictor.seat_bytes(seat, layout) == pool_bytes(config, stages[seat.stages[0]])


def test_room_for_one_request_alone_is_too_little(stages: dict[str, Stage]) -> None:
    needed = 2 * stages["decoder"].needs().minimum
    config = load_config("conf/tiny_t2v.yaml", f"transport.pool_bytes={needed}")
    assert pool_bytes(config, stages["decoder"]) == needed
    config = load_config("conf/tiny_t2v.yaml", f"transport.pool_bytes={needed - 1}")
    with pytest.raises(ConfigError, match=rf"transport\.pool_bytes: {needed - 1} is too small: .* {needed} bytes"):
        pool_bytes(config, stages["decoder"])


def test_a_stage_beside_another_that_feeds_the_same_one_needs_room_for_all_in_flight() -> None:
    apart = ("stages.encoder.blocks=[text_encoder]", "stages.image.blocks=[image_encoder, vae_encoder]")
    config = load_config("conf/tiny_i2v.yaml", *apart)
    stages = connect_stages(config)
    beside = [name for name, stage in stages.items() if stage.has_sibling]
    assert beside == ["encoder", "image"]
    needs = stages["image"].needs()
    least = REPLICA_WINDOW * needs.input_bytes + config.max_in_flight * needs.output_bytes
    few = load_config("conf/tiny_i2v.yaml", *apart, f"transport.pool_bytes={least - 1}")
    with pytest.raises(ConfigError, match=rf"is too small: 2 inputs and 8 outputs .* take {least} bytes"):
        pool_bytes(few, stages["image"])


def info(stage: str, num_rooms: int) -> ReplicaInfo:
    return ReplicaInfo(stage, stage, "", 0, "cpu", 0, num_rooms, {}, (), 0.0, 0.0, {})


def test_siblings_that_were_started_for_fewer_requests_bound_what_is_admitted() -> None:
    apart = ("stages.encoder.blocks=[text_encoder]", "stages.image.blocks=[image_encoder, vae_encoder]")
    config = load_config("conf/tiny_i2v.yaml", *apart, "stages.transformer.replicas=9")
    graph = build_graph([stage.ports for stage in connect_stages(config).values()])
    replicas = [info("encoder", 8), info("image", 8), info("image", 10), info("transformer", 2)]
    assert most_in_flight(config, graph, replicas) == 8
    assert most_in_flight(config, graph, [info("encoder", 24), info("image", 24)]) == config.max_in_flight == 24
    assert most_in_flight(config, graph, [info("encoder", 12), info("image", 9), info("image", 10)]) == 9
    assert most_in_flight(config, graph, []) == 24


def test_a_replica_without_room_waits_until_an_output_is_released(stages: dict[str, Stage]) -> None:
    room = 2 * stages["encoder"].needs().minimum
    config = load_config("conf/tiny_t2v.yaml", "stages.encoder.cache_bytes=0", f"transport.pool_bytes={room}")
    replica = Replica("encoder", 0, config)
    replica.load(build_graph([stage.ports for stage in stages.values()]), host="127.0.0.1")
    request, _ = resolve(Request(prompt="a red circle"), config)
    tasks = [Task(AttemptKey("full", number), request, ()) for number in range(3)]
    with ThreadPoolExecutor(1) as thread, closing(replica):
        for task in tasks[:2]:
            replica.run(task)
        waiting = thread.submit(replica.run, tasks[2])
        assert not wait([waiting], timeout=0.5).done
        assert replica.health().stalled == {"reserve": 0.0}
        with patch.object(Pool, "bytes_quarantined", room):  # which no release frees
            wait_until(lambda: replica.health().stalled_s > 0, "it waits for ever", 60)
        assert replica.health().stalled == {"reserve": 0.0}
        replica.release(tasks[0].key)
        assert waiting.result(timeout=60).handoff.tensors


class Factory:
    """Real schedulers over replicas whose pools have so many rooms, with a clock of its own."""

    def __init__(self, num_replicas: int, rooms: Callable[[str, int], int], seed: int) -> None:
        self.dice = random.Random(seed)
        self.priorities: dict[str, int] = {}
        self.now, self.ended, self.waits = 0.0, 0, 0
        self.in_flight = REPLICA_WINDOW * num_replicas * len(INPUTS)
        self.rooms = {stage: rooms(stage, self.in_flight) for stage in INPUTS}
        self.schedulers = {stage: StageScheduler() for stage in INPUTS}
        self.speeds: dict[str, float] = {}
        for stage, index in itertools.product(INPUTS, range(num_replicas)):
            name = f"{stage}-{index}"
            self.speeds[name] = self.dice.choice([0.1, 1.0, 3.0])
            self.schedulers[stage].add(name, f"{self.speeds[name]}", 0.0)
        self.used: Counter[str] = Counter()
        self.queues: dict[str, list[Job]] = {name: [] for name in self.speeds}
        """Jobs at a replica without room yet, in order."""
        self.inside: dict[str, str] = {}
        """Job or output, and in whose pool it has a room."""
        self.made: set[str] = set()
        self.events: list[tuple[float, int, float, Job]] = []
        """When a job is done, and the seconds it was computed."""
        self.serial = itertools.count()

    def run(self, num_requests: int) -> int:
        """Return how many requests end."""
        self.left = num_requests
        self.work(self.in_flight)
        return self.ended

    def work(self, num_more: int) -> None:
        """Admit up to `num_more` requests and run until no replica computes."""
        for _ in range(num_more):
            self.admit()
        while self.events:
            self.now, _, seconds, job = heapq.heappop(self.events)
            self.finish(job, seconds)

    def prioritize(self) -> int:
        return self.dice.choice([0, 0, 1, 5])

    def admit(self) -> None:
        if self.left:
            self.left -= 1
            self.priorities[f"{self.left:04}"] = self.prioritize()
            for stage in ("text", "image"):
                self.push(f"{self.left:04}", stage)

    def push(self, request: str, stage: str) -> None:
        sequence = 10_000 - int(request)
        priority = self.priorities[request]
        job = Job(f"{request} {stage}", 1.0, 1.0, priority, sequence, lambda place: self.move(job, place))
        self.schedulers[stage].push(job, self.now)

    def move(self, job: Job, place: Assignment | None) -> None:
        here = self.inside.get(job.request_id) or next((n for n, q in self.queues.items() if job in q), None)
        if here is not None and (place is None or here != place.replica):
            self.leave(job, here)
            here = None
        if place is not None and here is None:
            self.queues[place.replica].append(job)
            self.let_in(place.replica)
        elif place is not None and place.run and job.request_id in self.inside:
            self.compute(job)

    def leave(self, job: Job, replica: str) -> None:
        if job in self.queues[replica]:
            self.queues[replica].remove(job)
        else:
            self.release(job.request_id)
        self.let_in(replica)

    def let_in(self, replica: str) -> None:
        queue, stage = self.queues[replica], replica.partition("-")[0]
        while queue and self.used[replica] < self.rooms[stage]:
            job = queue.pop(0)
            self.used[replica] += 1
            self.inside[job.request_id] = replica
            if job.place is not None and job.place.run:
                self.compute(job)
        self.waits += bool(queue)

    def compute(self, job: Job) -> None:
        assert job.place is not None
        seconds = self.speeds[job.place.replica] * self.dice.uniform(0.5, 1.5)
        heapq.heappush(self.events, (self.now + seconds, next(self.serial), seconds, job))

    def release(self, name: str) -> None:
        replica = self.inside.pop(name)
        self.used[replica] -= 1
        self.let_in(replica)

    def finish(self, job: Job, seconds: float) -> None:
        request, _, stage = job.request_id.partition(" ")
        self.made.add(job.request_id)
        self.schedulers[stage].finish(job, self.now, seconds)
        for spent in [name for name, by in SPENT_BY.items() if by == stage]:
            self.release(f"{request} {spent}")
        for following, inputs in INPUTS.items():
            if stage in inputs and all(f"{request} {name}" in self.made for name in inputs):
                self.push(request, following)
        if stage == "decode":
            self.ended += 1
            self.admit()


def least_rooms(num_replicas: int) -> Callable[[str, int], int]:
    """Return the least rooms that an explicit `transport.pool_bytes` may come to."""

    def rooms(stage: str, in_flight: int) -> int:
        has_sibling = any(stage in inputs and len(inputs) > 1 for inputs in INPUTS.values())
        return num_rooms(in_flight, num_replicas, last=False) if has_sibling else REPLICA_WINDOW

    return rooms


def end_after_an_outage(factory: Factory, in_flight: int) -> int:
    """Return how many requests end if one sibling is away until others of higher priority wait too."""
    factory.left, num_first = 100, min(in_flight, 10)
    factory.schedulers["image"].retire("image-0", factory.now, lambda: None)
    with patch.object(factory, "prioritize", lambda: 0):
        factory.work(num_first)
    with patch.object(factory, "prioritize", lambda: 5):
        factory.work(in_flight - num_first)
        factory.schedulers["image"].add("image-0", "1.0", factory.now)
        factory.work(0)
    return factory.ended


def test_a_service_admits_no_more_than_its_siblings_pools_were_made_for() -> None:
    rooms = num_rooms(REPLICA_WINDOW * len(INPUTS), 1, last=False)
    scaled = REPLICA_WINDOW * (len(INPUTS) + 15)
    assert end_after_an_outage(Factory(1, lambda *_: rooms, 0), scaled) < 100, "nothing waits for ever"
    assert end_after_an_outage(Factory(1, lambda *_: rooms, 0), enough_for(rooms, 1)) == 100


@given(st.integers(2, 2000), st.integers(1, 1000))
def test_rooms_are_enough_for_what_they_were_counted_for(in_flight: int, replicas: int) -> None:
    rooms = num_rooms(in_flight, replicas, last=False)
    assert enough_for(rooms, replicas) >= in_flight
    assert num_rooms(enough_for(rooms, replicas), replicas, last=False) <= rooms


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("kind", ["least", "auto"])
def test_full_pools_hold_no_request_back_for_good(kind: str, num_replicas: int) -> None:
    least, auto = least_rooms(num_replicas), lambda _, in_flight: num_rooms(in_flight, num_replicas, last=False)
    factories = [Factory(num_replicas, least if kind == "least" else auto, seed) for seed in range(30)]
    assert [factory.run(100) for factory in factories] == [100] * 30
    assert not any(factory.used.total() for factory in factories)
    assert kind == "auto" or sum(factory.waits for factory in factories) > 0

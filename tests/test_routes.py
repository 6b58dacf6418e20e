"""Which route a pull takes, when one of two fails and works again."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from peer import HOST, TRANSPORT, make_tensors, publish

from disagg_ray.transfer import routes
from disagg_ray.transfer.handoff import AttemptKey, Handoff, Session
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.routes import FIRST_PAUSE_S, LONGEST_PAUSE_S, FailedRoutes, open_endpoints

NVLINK = Session("nvlink_intra", "host:1")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failed(clock: Clock) -> FailedRoutes:
    return FailedRoutes(clock)


def test_failed_route_is_left_out_twice_as_long_each_time(failed: FailedRoutes, clock: Clock) -> None:
    pauses = []
    for _ in range(10):
        pauses.append(failed.fail(NVLINK))
        assert failed.is_left_out(NVLINK)
        clock.now += pauses[-1]
        assert not failed.is_left_out(NVLINK)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_pause_is_short_again_after_a_success(failed: FailedRoutes) -> None:
    failed.fail(NVLINK)
    failed.fail(NVLINK)
    failed.succeed(NVLINK)
    assert not failed.is_left_out(NVLINK)
    assert failed.fail(NVLINK) == FIRST_PAUSE_S


def test_only_that_route_to_that_peer_is_left_out(failed: FailedRoutes) -> None:
    failed.fail(NVLINK)
    assert not failed.is_left_out(replace(NVLINK, route="tcp"))
    assert not failed.is_left_out(replace(NVLINK, name="host:2"))


def test_failures_of_dead_and_of_many_peers_are_forgotten(
    failed: FailedRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed.fail(NVLINK)
    failed.forget(NVLINK.name)
    assert not failed.is_left_out(NVLINK)
    monkeypatch.setattr(routes, "MAX_FAILED", 3)
    sessions = [Session("tcp", f"host:{port}") for port in range(10)]
    for session in sessions:
        failed.fail(session)
    assert [failed.is_left_out(session) for session in sessions] == 7 * [False] + 3 * [True]


@pytest.fixture
def pools() -> Iterator[tuple[Pool, Pool]]:
    """Give a producer and a consumer with two ways to each other, both TCP; the better one goes by another's name."""
    both = [Pool(name, 1 << 20, HOST, TRANSPORT) for name in ("producer", "consumer")]
    for pool in both:
        (second,) = open_endpoints(HOST, TRANSPORT, pool.memory.data, pool.memory.data).values()
        better = replace(second, session=replace(second.session, route="nvlink_intra"))
        pool.endpoints = {"nvlink_intra": better} | pool.endpoints
    yield both[0], both[1]
    for pool in both:
        pool.close()


def pull(pool: Pool, handoff: Handoff, attempt: int) -> torch.Tensor:
    key = AttemptKey("pulling", attempt)
    pool.reserve(key, {meta.name: meta.spec.nbytes for meta in handoff.tensors})
    return pool.pull(key, handoff)["latents"]


def test_better_route_is_taken_again_once_it_works(pools: tuple[Pool, Pool], clock: Clock) -> None:
    producer, consumer = pools
    consumer.failed_routes = FailedRoutes(clock)
    handoff, latents = publish(producer), make_tensors()["latents"]
    address, better = producer.memory.data.data_ptr(), producer.endpoints["nvlink_intra"].engine
    better.unregister(address)
    assert torch.equal(pull(consumer, handoff, 0), latents)
    assert consumer.route(handoff) == "tcp"
    better.register(address, producer.capacity)
    clock.now += FIRST_PAUSE_S
    assert torch.equal(pull(consumer, handoff, 1), latents)
    assert consumer.route(handoff) == "nvlink_intra"
    assert not any(map(consumer.failed_routes.is_left_out, handoff.sessions))

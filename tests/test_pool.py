"""Reserve, publish, pull and release, in one process, over Mooncake on loopback."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import HOST, TRANSPORT, fill, make_tensors

from disagg_ray.errors import Cancelled, ConfigError, PoolError, TransferError
from disagg_ray.transfer import pool as module
from disagg_ray.transfer import reservations
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.memory import PoolMemory
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import HEADER_BYTES, slot_bytes

CAPACITY = 1 << 16
UNIT = 1024 - HEADER_BYTES
"""Bytes of a tensor whose slot takes 1024 of the pool's 64 Ki."""

_numbers = itertools.count()


def new_key() -> AttemptKey:
    return AttemptKey(f"request-{next(_numbers)}", 0)


@pytest.fixture(scope="module")
def producer() -> Iterator[Pool]:
    pool = Pool("producer", CAPACITY, HOST, TRANSPORT)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def shared_consumer() -> Iterator[Pool]:
    pool = Pool("consumer", CAPACITY, HOST, TRANSPORT)
    yield pool
    pool.close()


@pytest.fixture
def consumer(shared_consumer: Pool, producer: Pool) -> Iterator[Pool]:
    """Give a pool, and find both empty again after the test."""
    yield shared_consumer
    for pool in (shared_consumer, producer):
        for key in list(pool.slots):
            pool.release(key)
        assert (pool.bytes_in_use, pool.bytes_quarantined) == (0, 0)


@pytest.fixture
def pool(consumer: Pool) -> Pool:
    """Give an empty pool, where only one is needed."""
    return consumer


@pytest.fixture(scope="module")
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(pool: Pool, workers: ThreadPoolExecutor, key: AttemptKey, nbytes: int = UNIT, **limit: float) -> Future:
    """Start a reservation that has to wait, and return once it stands in line."""
    place = pool.num_waiting + 1
    future = workers.submit(pool.reserve, key, {"x": nbytes}, **limit)
    wait_until(lambda: pool.num_waiting == place)
    return future


def publish(pool: Pool, key: AttemptKey, **tensors: torch.Tensor) -> Handoff:
    pool.reserve(key, {name: tensor.nbytes for name, tensor in tensors.items()})
    return pool.publish(key, tensors)


def pull(pool: Pool, key: AttemptKey, handoff: Handoff) -> dict[str, torch.Tensor]:
    pool.reserve(key, {meta.name: meta.spec.nbytes for meta in handoff.tensors})
    return pool.pull(key, handoff)


def assert_equal(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert torch.equal(tensor, expected)


DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5, 7), (1, 16, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pulled_tensors_equal_published_ones(producer, consumer, dtype, shape):
    tensor = (torch.randn(shape) * 100).to(dtype)
    pulled = pull(consumer, new_key(), publish(producer, new_key(), x=tensor))
    assert_equal(pulled["x"], tensor)


def test_several_tensors_travel_together(producer, consumer):
    tensors = make_tensors()
    handoff = publish(producer, new_key(), **tensors)
    assert handoff.names == tuple(tensors)
    assert handoff.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in pull(consumer, new_key(), handoff).items():
        assert_equal(tensor, tensors.pop(name))
    assert not tensors


def test_only_the_named_tensors_are_pulled(producer, consumer):
    handoff, key = publish(producer, new_key(), a=torch.ones(3), b=torch.zeros(300)), new_key()
    consumer.reserve(key, {"a": 12})
    assert list(consumer.pull(key, handoff, ["a"])) == ["a"]


def test_transposed_and_gradient_tensors_are_published_by_value(producer, consumer):
    tensor = torch.randn(4, 6, requires_grad=True).transpose(0, 1)
    pulled = pull(consumer, new_key(), publish(producer, new_key(), x=tensor))["x"]
    assert_equal(pulled, tensor.detach())
    assert not pulled.requires_grad


def test_pulled_tensors_lie_in_the_pool(producer, consumer):
    pulled = pull(consumer, new_key(), publish(producer, new_key(), x=torch.ones(5)))["x"]
    assert 0 < pulled.data_ptr() - consumer.memory.data.data_ptr() < CAPACITY


def test_reserve_takes_all_or_nothing(pool):
    fill(pool, leave=2048)
    with pytest.raises(PoolError, match=r"no room for 3072 bytes within 0 s"):
        pool.reserve(new_key(), {"a": UNIT, "b": UNIT, "c": UNIT}, timeout_s=0)
    assert pool.bytes_in_use == CAPACITY - 2048
    pool.reserve(new_key(), {"a": UNIT, "b": UNIT}, timeout_s=0)
    assert pool.bytes_in_use == CAPACITY


def test_reservation_larger_than_the_pool_is_refused_with_the_numbers(pool):
    with pytest.raises(
        PoolError, match=rf"{slot_bytes(CAPACITY)} bytes .* holds {CAPACITY}; raise transport.pool_bytes"
    ):
        pool.reserve(new_key(), {"x": CAPACITY})


def test_a_name_is_reserved_once(pool):
    key = new_key()
    pool.reserve(key, {"x": 1})
    with pytest.raises(PoolError, match="room for x was reserved before"):
        pool.reserve(key, {"x": 1, "y": 1})
    assert pool.bytes_in_use == slot_bytes(1)


def test_reserve_goes_on_when_another_releases(pool, workers):
    filling = fill(pool)
    future = waiting(pool, workers, new_key())
    assert not future.done()
    pool.release(filling)
    assert future.result(60) is None
    assert pool.bytes_in_use == 1024


def test_reservations_are_served_in_order(pool, workers):
    filling, first, second = fill(pool, leave=1024), new_key(), new_key()
    large = waiting(pool, workers, first, CAPACITY - 1024 - HEADER_BYTES)
    small = waiting(pool, workers, second)
    time.sleep(0.05)
    assert not small.done(), "it would fit, and comes after the large one"
    pool.release(filling)
    large.result(60)
    small.result(60)
    assert pool.bytes_in_use == CAPACITY


def test_those_behind_go_on_when_the_first_in_line_gives_up(pool, workers):
    fill(pool, leave=1024)
    large = waiting(pool, workers, new_key(), CAPACITY - HEADER_BYTES, timeout_s=1)
    small = waiting(pool, workers, new_key())
    assert small.result(60) is None
    assert isinstance(large.exception(60), PoolError)


def test_waiting_reserve_ends_at_its_timeout(pool, workers):
    fill(pool)
    started = time.monotonic()
    with pytest.raises(PoolError, match=r"no room for 1024 bytes within 0\.1 s"):
        pool.reserve(new_key(), {"x": UNIT}, timeout_s=0.1)
    assert time.monotonic() - started >= 0.1


def test_waiting_reserve_ends_when_its_key_is_released(pool, workers):
    fill(pool)
    key = new_key()
    future = waiting(pool, workers, key)
    pool.release(key)
    with pytest.raises(Cancelled, match=key.request_id):
        future.result(60)
    assert pool.bytes_in_use == CAPACITY


def test_waiting_reserve_ends_when_the_pool_closes(workers):
    pool = Pool("closing", 1024, HOST, TRANSPORT)
    fill(pool)
    future = waiting(pool, workers, new_key(), 1)
    pool.close()
    with pytest.raises(PoolError, match="closing: the pool is closed"):
        future.result(60)


def test_closed_pool_refuses(producer):
    pool = Pool("closed", 4096, HOST, TRANSPORT)
    handoff = publish(pool, key := new_key(), x=torch.ones(3))
    pool.close()
    for refused in (lambda: pool.reserve(new_key(), {"x": 1}), lambda: pool.publish(key, {"x": torch.ones(3)})):
        with pytest.raises(PoolError, match="closed"):
            refused()
    with pytest.raises(TransferError):
        pull(producer, reader := new_key(), handoff)
    producer.release(reader)


def test_release_is_idempotent(pool):
    key, other = new_key(), new_key()
    pool.reserve(key, {"x": UNIT})
    pool.reserve(other, {"x": UNIT})
    for _ in range(3):
        pool.release(key)
    assert pool.bytes_in_use == 1024


def test_released_key_is_never_served_again(producer, consumer):
    handoff, key = publish(producer, new_key(), x=torch.ones(3)), new_key()
    consumer.release(key)
    late = [
        lambda: consumer.reserve(key, {"x": 12}),
        lambda: consumer.publish(key, {"x": torch.ones(3)}),
        lambda: consumer.pull(key, handoff),
    ]
    for serve in late:
        with pytest.raises(Cancelled, match=f"request {key.request_id} attempt 0 was cancelled"):
            serve()
    assert consumer.is_released(key)
    consumer.reserve(key._replace(attempt=1), {"x": 12})


def test_releasing_some_names_keeps_the_others(pool):
    key = new_key()
    pool.reserve(key, {"in": UNIT, "out": UNIT})
    pool.release(key, ["in", "never reserved"])
    assert pool.bytes_in_use == 1024
    assert pool.publish(key, {"out": torch.ones(3)}).names == ("out",)


def test_publishing_more_than_was_reserved_is_refused(pool):
    pool.reserve(key := new_key(), {"x": 256})
    with pytest.raises(PoolError, match="x has 260 bytes, more than was reserved for it"):
        pool.publish(key, {"x": torch.ones(65)})
    with pytest.raises(PoolError, match="no room was reserved for y"):
        pool.publish(key, {"y": torch.ones(1)})


def test_pulling_more_than_was_reserved_is_refused(producer, consumer):
    handoff = publish(producer, new_key(), x=torch.ones(65))
    consumer.reserve(key := new_key(), {"x": 256})
    with pytest.raises(PoolError, match="x has 260 bytes, more than was reserved for it"):
        consumer.pull(key, handoff)


def test_release_during_a_pull_waits_for_the_copy_and_wins(producer, consumer, monkeypatch):
    (endpoint,) = consumer.endpoints.values()
    handoff, key, read = publish(producer, new_key(), x=torch.ones(UNIT // 4)), new_key(), endpoint.engine.read

    def read_and_release(*regions: object) -> None:
        consumer.release(key)
        assert consumer.bytes_in_use == 1024
        read(*regions)

    monkeypatch.setattr(endpoint.engine, "read", read_and_release)
    with pytest.raises(Cancelled):
        pull(consumer, key, handoff)
    assert consumer.bytes_in_use == 0


def test_release_during_a_publish_waits_for_the_copy_and_wins(pool, monkeypatch):
    key = new_key()

    def release_and_add(data: torch.Tensor) -> int:
        pool.release(key)
        assert pool.bytes_in_use == 1024
        return 0

    monkeypatch.setattr(module, "checksum", release_and_add)
    with pytest.raises(Cancelled):
        publish(pool, key, x=torch.ones(UNIT // 4))
    assert pool.bytes_in_use == 0


def test_release_before_the_check_of_pulled_bytes_keeps_them_until_it_is_done(producer, consumer, monkeypatch):
    handoff, key, checksum = publish(producer, new_key(), x=torch.ones(UNIT // 4)), new_key(), module.checksum

    def release_and_add(data: torch.Tensor) -> int:
        consumer.release(key)
        assert consumer.bytes_in_use == 1024, "freed bytes could change while they are checked"
        return checksum(data)

    monkeypatch.setattr(module, "checksum", release_and_add)
    with pytest.raises(Cancelled):
        pull(consumer, key, handoff)
    assert consumer.bytes_in_use == 0


def test_pool_forgets_the_oldest_released_keys(monkeypatch):
    monkeypatch.setattr(reservations, "REMEMBERED_KEYS", 2)
    pool = Pool("forgetful", CAPACITY, HOST, TRANSPORT)
    keys = [new_key() for _ in range(3)]
    for key in keys:
        pool.release(key)
    assert [pool.is_released(key) for key in keys] == [False, True, True]
    pool.close()


def spoil(handoff: Handoff) -> Handoff:
    """Return a handoff whose last tensor lies outside of registered memory."""
    *good, last = handoff.tensors
    return replace(handoff, tensors=(*good, replace(last, address=4096)))


STEPS = st.tuples(
    st.sampled_from(["reserve", "publish", "pull", "pull spoilt", "release", "release one"]),
    st.integers(0, 2),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, CAPACITY // 4), min_size=1),
)


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=25))
def test_nothing_leaks_from_any_mix_of_successes_and_failures(producer, shared_consumer, steps):
    keys = [new_key() for _ in range(3)]
    source = torch.arange(200, dtype=torch.uint8)
    handoff = publish(producer, published := new_key(), a=source, b=source, c=source)
    for action, index, sizes in steps:
        with suppress(PoolError, TransferError, Cancelled):
            take(shared_consumer, action, keys[index], sizes, handoff)
        held = sum(span.nbytes for slots in shared_consumer.slots.values() for span in slots.values())
        assert shared_consumer.bytes_in_use == held
    for key in keys:
        shared_consumer.release(key)
    producer.release(published)
    for pool in (producer, shared_consumer):
        assert pool.bytes_in_use == 0
        pool.release(fill(pool))  # in one piece


def take(pool: Pool, action: str, key: AttemptKey, sizes: dict[str, int], handoff: Handoff) -> None:
    """Take one step of the test above."""
    if action == "reserve":
        pool.reserve(key, sizes, timeout_s=0)
    elif action == "publish":
        pool.publish(key, {name: torch.ones(size, dtype=torch.uint8) for name, size in sizes.items()})
    elif action == "pull":
        assert all(tensor[-1] == 199 for tensor in pool.pull(key, handoff, sizes).values())
    elif action == "pull spoilt":
        pool.pull(key, spoil(handoff), sizes)
    else:
        pool.release(key, sizes if action == "release one" else None)


def test_many_threads_share_one_pool(producer, consumer, workers):
    def trade(number: int) -> bool:
        key, tensor = new_key(), torch.full((UNIT * 12 // 4,), float(number))
        try:
            return torch.equal(pull(consumer, key, publish(producer, key, x=tensor))["x"], tensor)
        finally:
            producer.release(key)
            consumer.release(key)

    assert all(workers.map(trade, range(100)))
    before = threading.active_count()
    assert all(workers.map(trade, range(100)))
    assert threading.active_count() <= before, "a trade leaves a thread behind"


@pytest.mark.parametrize("nbytes", [2**62, 2**70])
def test_a_pool_that_no_memory_holds_is_refused_in_one_line(nbytes: int) -> None:
    with pytest.raises(ConfigError, match=r"^transport.pool_bytes: a pool of \d+ bytes does not fit this machine"):
        PoolMemory(nbytes, "cpu")

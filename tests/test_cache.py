"""Tensors kept in a pool's spare room: who goes first, and that they give way."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import HOST, TRANSPORT

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import PoolError, RequestError
from disagg_ray.graph import build_graph
from disagg_ray.replica.actor import Replica
from disagg_ray.replica.messages import Task
from disagg_ray.request import Request, resolve
from disagg_ray.transfer.handoff import AttemptKey
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import ALIGNMENT, HEADER_BYTES, slot_bytes

CAPACITY = 16 * 1024
CACHE_BYTES = 4 * 1024
UNIT = 1024 - HEADER_BYTES
"""Bytes of a tensor that takes 1024 of the pool's 16 Ki."""
KEY = AttemptKey("request", 0)

_numbers = itertools.count()


def new_key() -> AttemptKey:
    return AttemptKey("filling", next(_numbers))


def tensor(value: int, nbytes: int = UNIT) -> torch.Tensor:
    return torch.full((nbytes // 4,), value, dtype=torch.int32)


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[Pool]:
    pool = Pool("cached", CAPACITY, HOST, TRANSPORT, cache_bytes=CACHE_BYTES)
    yield pool
    pool.close()


@pytest.fixture
def pool(shared_pool: Pool) -> Iterator[Pool]:
    """Give an empty pool, and leave it so."""
    yield shared_pool
    empty(shared_pool)


def empty(pool: Pool) -> None:
    """Free all slots and all that is kept, and find every byte again."""
    for key in list(pool.slots):
        pool.release(key)
    while pool.cache.evict():
        pass
    assert (pool.bytes_in_use, pool.cache.bytes_kept) == (0, 0)
    pool.reserve(whole := new_key(), {"all": CAPACITY - HEADER_BYTES}, timeout_s=0)  # in one piece
    pool.release(whole)


def fill(pool: Pool, leave: int) -> None:
    """Let slots take all but `leave` bytes of the pool."""
    pool.reserve(new_key(), {"filling": CAPACITY - leave - HEADER_BYTES}, timeout_s=0)


def kept(pool: Pool) -> list[object]:
    """Return the keys of what is kept, least recently used first."""
    return list(pool.cache.keys)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5, 7), (1, 8, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
def test_a_kept_tensor_comes_back_as_it_was(pool, shape, dtype):
    given = (torch.randn(shape) * 100).to(dtype)
    pool.cache.put("text", given)
    found = pool.cache.get("text")
    assert (found.dtype, found.shape, found.stride()) == (given.dtype, given.shape, given.stride())
    assert torch.equal(found, given)


def test_what_comes_back_is_the_callers_own(pool):
    pool.cache.put("text", tensor(1))
    pool.cache.get("text").zero_()
    assert torch.equal(pool.cache.get("text"), tensor(1))


def test_hits_and_misses_are_counted(pool):
    hits, misses = pool.cache.hits, pool.cache.misses
    assert pool.cache.get("text") is None
    pool.cache.put("text", tensor(1))
    pool.cache.get("text")
    assert (pool.cache.hits, pool.cache.misses) == (hits + 1, misses + 1)


def test_kept_bytes_are_not_in_use(pool):
    pool.cache.put("text", tensor(1))
    assert (pool.bytes_in_use, pool.cache.bytes_kept) == (0, 1024)


def test_the_least_recently_used_goes_first(pool):
    for number in range(4):
        pool.cache.put(number, tensor(number))
    pool.cache.get(0)
    pool.cache.put(4, tensor(4))
    assert kept(pool) == [2, 3, 0, 4]


def test_what_is_larger_than_the_bound_is_not_kept_and_drives_nothing_out(pool):
    pool.cache.put("small", tensor(1))
    pool.cache.put("large", tensor(2, CACHE_BYTES))
    assert kept(pool) == ["small"]


def test_nothing_is_kept_in_a_full_pool_and_nobody_waits(pool):
    fill(pool, leave=0)
    pool.cache.put("text", tensor(1))
    assert pool.cache.get("text") is None
    assert pool.bytes_in_use == CAPACITY


def test_kept_tensors_replace_one_another_where_slots_leave_room_for_one(pool):
    fill(pool, leave=1024)
    for number in range(3):
        pool.cache.put(number, tensor(number))
    assert kept(pool) == [2]


def test_as_many_give_way_as_a_reservation_needs(pool):
    for number in range(4):
        pool.cache.put(number, tensor(number))
    pool.cache.get(0)
    fill(pool, leave=4 * 1024)
    assert kept(pool) == [1, 2, 3, 0]
    pool.reserve(new_key(), {"x": UNIT, "y": UNIT}, timeout_s=0)
    assert kept(pool) == [3, 0]


def test_none_gives_way_to_a_reservation_that_has_to_wait_even_so(pool):
    fill(pool, leave=2 * 1024)
    pool.cache.put("text", tensor(1))
    with pytest.raises(PoolError, match="no room"):
        pool.reserve(new_key(), {"x": 2 * 1024}, timeout_s=0)
    assert kept(pool) == ["text"]


def test_a_reservation_waits_for_a_copy_and_never_spoils_it(pool, monkeypatch):
    copying, go_on = threading.Event(), threading.Event()

    @contextmanager
    def slow_stream(**_: object) -> Iterator[None]:
        copying.set()
        assert go_on.wait(60)
        yield

    pool.cache.put("text", tensor(1))
    monkeypatch.setattr(pool.memory, "own_stream", slow_stream)
    with ThreadPoolExecutor() as workers:
        copy = workers.submit(pool.cache.get, "text")
        assert copying.wait(60)
        reservation = workers.submit(pool.reserve, new_key(), {"x": CAPACITY - HEADER_BYTES}, 60)
        with pytest.raises(TimeoutError):
            reservation.result(0.05)
        go_on.set()
        assert torch.equal(copy.result(60), tensor(1))
        reservation.result(60)
    assert kept(pool) == []


def test_a_failed_copy_keeps_nothing_and_leaks_nothing(pool, monkeypatch):
    def refuse(**_: object) -> Iterator[None]:
        raise RuntimeError("no stream")
        yield

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no stream"):
        patch.setattr(pool.memory, "own_stream", contextmanager(refuse))
        pool.cache.put("text", tensor(1))
    assert (kept(pool), pool.cache.bytes_kept) == ([], 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 7)), max_size=40))
def test_equal_sizes_follow_the_plain_rule(shared_pool, steps):
    rule: OrderedDict[int, None] = OrderedDict()
    for action, number in steps:
        if action == "put":
            shared_pool.cache.put(number, tensor(number))
            rule.setdefault(number)
            while len(rule) > CACHE_BYTES // 1024:
                rule.popitem(last=False)
        else:
            assert (shared_pool.cache.get(number) is not None) == (number in rule)
            if number in rule:
                rule.move_to_end(number)
        assert kept(shared_pool) == list(rule)
    empty(shared_pool)


STEPS = st.tuples(st.sampled_from(["get", "put", "reserve", "release"]), st.integers(0, 7), st.integers(1, CAPACITY))


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=40))
def test_bounds_and_contents_hold_in_any_order(shared_pool, steps):
    keys = [new_key() for _ in range(8)]
    for action, number, nbytes in steps:
        key = keys[number]
        if action == "put":
            shared_pool.cache.put((number, nbytes // 4), tensor(number, nbytes))
        elif action == "get":
            for name, length in kept(shared_pool):
                assert torch.equal(shared_pool.cache.get((name, length)), torch.full((length,), name).int())
        elif action == "reserve":
            with suppress(PoolError):
                shared_pool.reserve(key, {f"x{nbytes}": nbytes}, timeout_s=0)
        else:
            shared_pool.release(key, list(shared_pool.slots.get(key, {})))
        taken = sum(span.nbytes for slots in shared_pool.slots.values() for span in slots.values())
        assert shared_pool.bytes_in_use == taken
        assert shared_pool.cache.bytes_kept <= min(CACHE_BYTES, CAPACITY - taken)
        assert shared_pool.cache.bytes_kept == sum(slot_bytes(4 * length) for _, length in kept(shared_pool))
    empty(shared_pool)


@settings(max_examples=60)
@given(st.lists(st.integers(1, CACHE_BYTES), max_size=8), st.integers(1, CAPACITY - HEADER_BYTES))
def test_a_pool_full_of_kept_tensors_serves_whatever_an_empty_one_does(shared_pool, lengths, nbytes):
    for number, length in enumerate(lengths):
        shared_pool.cache.put(number, tensor(number, length))
    shared_pool.reserve(new_key(), {"x": nbytes}, timeout_s=0)
    assert shared_pool.bytes_in_use == slot_bytes(nbytes)
    empty(shared_pool)


def test_many_threads_keep_look_up_and_reserve(pool):
    """Slots are written over what was evicted: a copy that raced would show their bytes."""

    def work(number: int) -> int:
        hits, key = 0, new_key()
        for turn in range(50):
            text = (number + turn) % 6
            pool.cache.put(text, tensor(text))
            found = pool.cache.get(text)
            assert found is None or torch.equal(found, tensor(text))
            hits += found is not None
            name = str(turn)
            pool.reserve(key, {name: 6 * 1024}, timeout_s=30)
            pool.publish(key, {name: tensor(-1, 6 * 1024)})
            pool.release(key, [name])
        return hits

    with ThreadPoolExecutor(8) as workers:
        assert sum(workers.map(work, range(8))) > 0
    assert pool.bytes_in_use == 0
    assert pool.cache.bytes_kept <= CACHE_BYTES


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("conf/tiny_t2v.yaml")


def start(config: Config, stage: str = "encoder", **transport: object) -> Replica:
    """Return a loaded replica of a stage, alone of its graph."""
    config = replace(config, transport=replace(TRANSPORT, **transport))
    graph = build_graph([Replica(name, 0, config).describe().ports for name in config.stages])
    replica = Replica(stage, 0, config)
    replica.load(graph, host=HOST)
    return replica


@pytest.fixture(scope="module")
def encoder(config: Config) -> Iterator[Replica]:
    replica = start(config)
    yield replica
    replica.close()


def encode(replica: Replica, config: Config, attempt: int, **asked: object) -> dict[str, object]:
    """Encode a request's texts and return what was published, by name; the slots stay."""
    request, _ = resolve(Request(**{"prompt": "a red circle"} | asked), config)
    reply = replica.run(Task(KEY._replace(attempt=attempt), request, ()))
    return {meta.name: (meta.spec, meta.checksum) for meta in reply.handoff.tensors}


def test_a_prompt_equal_to_the_negative_prompt_is_encoded_once(encoder, config):
    before = encoder.health()
    made = encode(encoder, config, 0, prompt="twice", negative_prompt="twice")
    after = encoder.health()
    encoder.release(KEY)
    assert made["prompt_embeds"] == made["negative_prompt_embeds"]
    assert (after.cache_hits - before.cache_hits, after.cache_misses - before.cache_misses) == (1, 1)


def test_embeddings_are_the_same_kept_or_not_and_wherever_the_text_stands(encoder, config):
    missed = encode(encoder, config, 1, prompt="a red circle", negative_prompt="a blue square")
    found = encode(encoder, config, 2, prompt="a blue square", negative_prompt="a red circle")
    for attempt in (1, 2):
        encoder.release(KEY._replace(attempt=attempt))
    assert missed["prompt_embeds"] != missed["negative_prompt_embeds"]
    assert found["prompt_embeds"] == missed["negative_prompt_embeds"]
    assert found["negative_prompt_embeds"] == missed["prompt_embeds"]
    assert encoder.health().bytes_in_use == 0 < encoder.health().bytes_kept


def test_a_prompt_that_is_too_long_is_refused_beside_one_that_is_kept(encoder, config):
    encode(encoder, config, 3, negative_prompt="blurry")
    for attempt in (4, 5):
        with pytest.raises(RequestError, match=r"prompt: .* tokens are over"):
            encode(encoder, config, attempt, prompt="a red circle " * 100, negative_prompt="blurry")
    encoder.release(KEY._replace(attempt=3))


def test_the_cache_gives_way_to_outputs(encoder, config):
    minimum = encoder.stage.needs().minimum
    small = start(config, pool_bytes=2 * minimum)
    first = encode(small, config, 6)
    assert small.health().bytes_kept > 0
    second = encode(small, config, 7)
    health = small.health()
    assert (health.bytes_kept, health.bytes_in_use, health.cache_misses) == (0, 2 * minimum, 4)
    assert first == second
    small.close()


def test_only_a_stage_that_encodes_text_has_room_for_a_cache(encoder, config):
    none = {name: replace(stage, cache_bytes=0) for name, stage in config.stages.items()}
    without = start(replace(config, stages=none))
    decoder, plain = start(config, "decoder"), start(replace(config, stages=none), "decoder")
    asked = config.stages["encoder"].cache_bytes
    assert asked % ALIGNMENT == 0
    assert encoder.health().pool_bytes - without.health().pool_bytes == asked
    assert decoder.health().pool_bytes == plain.health().pool_bytes
    for replica in (without, decoder, plain):
        replica.close()

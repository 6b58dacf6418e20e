"""Pools in GPU memory: every route, every fallback, peers that die, streams that wait for nobody else."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch
from peer import HOST, TRANSPORT
from worker import MIB, Worker, growing, make_tensors, publish, pull, usage

from disagg_ray.errors import ConfigError, PoolError, TransferError
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import HEADER_BYTES

FIRST, SECOND = "cuda:0", "cuda:1"
NVLINK = "nvlink_intra"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[[str], Worker]]:
    """Give the worker of a device, started at its first use; `again` tells two on one device apart."""
    with ExitStack() as stack:
        yield cache(lambda device, again=False: stack.enter_context(Worker(device)))


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[..., Pool]]:
    """Give a pool of this process by device and protocol, made at its first use."""
    made: list[Pool] = []

    @cache
    def make(device: str, protocol: str = "auto") -> Pool:
        made.append(Pool(f"here-{device}", 64 * MIB, HOST, replace(TRANSPORT, protocol=protocol), device))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def by(handoff: Handoff, *routes: str) -> Handoff:
    """Return a handoff that offers only these routes."""
    return replace(handoff, sessions=tuple(s for s in handoff.sessions if s.route in routes))


def broken(handoff: Handoff, route: str, **changes: object) -> Handoff:
    """Return a handoff with one session edited."""
    edited = (replace(s, **changes) if s.route == route else s for s in handoff.sessions)  # type: ignore[arg-type]
    return replace(handoff, sessions=tuple(edited))


@two_gpus
def test_two_gpus_offer_both_routes_and_take_nvlink(workers):
    handoff = workers(SECOND).ask(publish, SECOND)
    assert [session.route for session in handoff.sessions] == [NVLINK, "tcp"]
    assert workers(FIRST).ask(pull, handoff) == NVLINK


@two_gpus
def test_two_gpus_by_tcp_through_pinned_memory(workers):
    handoff = workers(SECOND).ask(publish, SECOND)
    assert workers(FIRST).ask(pull, by(handoff, "tcp")) == "tcp"


@two_gpus
def test_both_ways_at_once(workers):
    """Each reads what the other has published, and publishes again while the other reads."""
    handoffs = {device: workers(device).ask(publish, device) for device in (FIRST, SECOND)}
    for _ in range(10):
        workers(FIRST).tell(pull, handoffs[SECOND])
        workers(SECOND).tell(pull, handoffs[FIRST])
        assert [workers(device).answer() for device in (FIRST, SECOND)] == [NVLINK, NVLINK]


def test_two_processes_share_one_gpu(workers):
    handoff = workers(FIRST).ask(publish, FIRST)
    assert workers(FIRST, again=True).ask(pull, handoff) == NVLINK
    assert workers(FIRST, again=True).ask(pull, by(handoff, "tcp")) == "tcp"


def test_host_tensors_are_published_from_a_gpu_pool(workers):
    handoff = workers(FIRST).ask(publish, "cpu")
    assert workers(FIRST, again=True).ask(pull, handoff) == NVLINK


@pytest.mark.parametrize("there", [FIRST, pytest.param(SECOND, marks=two_gpus)])
def test_gpu_pool_to_host_pool(workers, pools, there):
    assert pull(pools("cpu"), workers(there).ask(publish, there)) == "tcp"


@pytest.mark.parametrize("there", [FIRST, pytest.param(SECOND, marks=two_gpus)])
def test_host_pool_to_gpu_pool(workers, pools, there):
    assert workers(there).ask(pull, publish(pools("cpu"), "cpu")) == "tcp"


def test_pools_of_one_process_hand_over(pools):
    """CUDA does not let a process open its own memory as another's: this may fall back."""
    handoff, second = publish(pools(FIRST), FIRST), Pool("second", 16 * MIB, HOST, TRANSPORT, FIRST)
    routes = [pull(second, handoff) for _ in range(2)]
    print("routes within one process:", routes)
    assert set(routes) <= {NVLINK, "tcp"}
    second.close()


BREAKS = {"nobody listens": {"name": f"{HOST}:9"}, "not registered": {"shift": -(1 << 40)}}


@pytest.mark.parametrize("changes", BREAKS.values(), ids=BREAKS.keys())
def test_broken_nvlink_falls_back_to_tcp_once_and_loudly(workers, changes, caplog):
    pool = Pool("falling", 64 * MIB, HOST, TRANSPORT, FIRST)
    handoff = broken(workers(FIRST).ask(publish, FIRST), NVLINK, **changes)
    assert pool.route(handoff) == NVLINK
    with caplog.at_level(logging.WARNING, "disagg_ray"):
        assert [pull(pool, handoff) for _ in range(3)] == ["tcp"] * 3
    assert sum("go by tcp for 30 s" in record.message for record in caplog.records) == 1
    assert usage(pool) == (0, 0)
    pool.close()


def test_the_only_route_broken_is_an_error_and_leaks_nothing(workers, pools):
    handoff = workers(FIRST).ask(publish, FIRST)
    only = by(broken(handoff, NVLINK, name=f"{HOST}:9"), NVLINK)
    with pytest.raises(TransferError, match="gone or refused"):
        pull(pools(FIRST), only)
    assert pull(pools("cpu"), handoff) == "tcp"
    assert usage(pools(FIRST))[1] == 0


def test_routes_that_do_not_meet_are_named(workers, pools):
    handoff = by(workers(FIRST).ask(publish, FIRST), NVLINK)
    with pytest.raises(TransferError, match=r"offers \['nvlink_intra'\] and here-cpu has \['tcp'\]"):
        pull(pools("cpu"), handoff)


@pytest.mark.parametrize("protocol", [NVLINK, "tcp"])
def test_peer_killed_before_first_contact_is_an_error_at_once(workers, protocol):
    with Worker(FIRST) as dying:
        handoff = dying.ask(publish, FIRST)
        dying.kill()
    started = time.monotonic()
    with pytest.raises(TransferError):
        workers(FIRST, again=True).ask(pull, by(handoff, protocol))
    assert time.monotonic() - started < TRANSPORT.timeout_s + 3
    assert workers(FIRST, again=True).ask(usage) == (0, 0)


def test_peer_killed_amid_a_pull_by_tcp_is_an_error_within_the_deadline():
    """The peer dies as soon as the first bytes of a gigabyte have arrived."""
    large = 1000 * MIB
    pool = Pool("pulling", large + MIB, HOST, TRANSPORT, FIRST)
    memory = pool.endpoints["tcp"].memory
    errors: list[BaseException] = []

    def run(handoff: Handoff) -> None:
        key = AttemptKey("large", 0)
        pool.reserve(key, {"large": large})
        try:
            pool.pull(key, by(handoff, "tcp"), ["large"])
        except TransferError as error:
            errors.append(error)
        finally:
            pool.release(key)

    with Worker(FIRST, large + MIB) as dying:
        handoff = dying.ask(publish, FIRST, large)
        puller = threading.Thread(target=run, args=(handoff,))
        started = time.monotonic()
        puller.start()
        while not memory[HEADER_BYTES : HEADER_BYTES + 64].any():
            assert time.monotonic() - started < 10
        dying.kill()
        puller.join(TRANSPORT.timeout_s + 10)
    assert not puller.is_alive()
    assert errors, "the pull ended before the peer did"
    in_use, quarantined = usage(pool)
    assert in_use == quarantined, "only the destination of a read that timed out may stay taken"
    pool.close()


@two_gpus
def test_peer_killed_amid_pulls_by_nvlink_gives_whole_tensors_or_an_error():
    """A GPU's memory may outlive its process for as long as a reader has it open; half a tensor never passes."""
    with Worker(SECOND, 160 * MIB) as dying, Worker(FIRST, 160 * MIB) as reader:
        handoff = by(dying.ask(publish, SECOND, 128 * MIB), NVLINK)
        assert reader.ask(pull, handoff) == NVLINK
        reader.tell(pull, handoff)
        dying.kill()
        outcomes = []
        for _ in range(2):
            try:
                outcomes.append(reader.answer())
            except TransferError as error:
                outcomes.append(type(error).__name__)
            reader.tell(pull, handoff)
        print("pulls by nvlink_intra from a dead peer:", outcomes)
        assert set(outcomes) <= {NVLINK, "TransferError", "ReadTimeout", "none"}


def test_reservation_beyond_the_pool_is_refused(pools):
    with pytest.raises(PoolError, match=r"raise transport\.pool_bytes"):
        pools(FIRST).reserve(AttemptKey("too large", 0), {"x": pools(FIRST).capacity})
    assert usage(pools(FIRST))[1] == 0


def test_full_pool_makes_a_reservation_wait_until_its_time_is_up():
    pool = Pool("full", 32 * MIB, HOST, TRANSPORT, FIRST)
    pool.reserve(key := AttemptKey("first", 0), {"x": pool.capacity - HEADER_BYTES})
    with pytest.raises(PoolError, match=r"no room for \d+ bytes within 0\.1 s"):
        pool.reserve(AttemptKey("second", 0), {"x": 1}, timeout_s=0.1)
    pool.release(key)
    pool.reserve(AttemptKey("third", 0), {"x": 1}, timeout_s=0)
    pool.close()


def test_pool_larger_than_the_gpu_names_the_setting():
    _, total = torch.cuda.mem_get_info(FIRST)
    with pytest.raises(ConfigError, match=r"transport\.pool_bytes: a pool of .* does not fit the GPU"):
        Pool("huge", total + MIB, HOST, TRANSPORT, FIRST)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_a_pool_is_shared_where_other_segments_grow(workers, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with Worker(FIRST) as other:
        assert other.ask(growing) == {False, True}
        handoff = other.ask(publish, FIRST)
        assert workers(FIRST, again=True).ask(pull, handoff) == NVLINK
        assert other.ask(pull, workers(FIRST, again=True).ask(publish, FIRST)) == NVLINK


@pytest.fixture
def busy() -> Iterator[Callable[[torch.cuda.Stream], torch.cuda.Event]]:
    """Give a function that keeps a stream of the first GPU busy for about a second, and says when it ends."""
    ends: list[torch.cuda.Event] = []

    def start(stream: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000_000)
            ends.append(torch.cuda.Event())
            ends[-1].record()
        return ends[-1]

    yield start
    for end in ends:
        end.synchronize()


def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(FIRST)


def default_stream() -> torch.cuda.Stream:
    return torch.cuda.default_stream(FIRST)


orders_after_default = pytest.mark.xfail(
    reason="Mooncake orders a read after cudaStreamPerThread, which waits for the default stream; stages use their own"
)


@pytest.mark.parametrize(
    ("route", "stream"),
    [
        (NVLINK, side_stream),
        ("tcp", side_stream),
        ("tcp", default_stream),
        pytest.param(NVLINK, default_stream, marks=orders_after_default),
    ],
)
def test_pull_does_not_wait_for_a_kernel(workers, pools, busy, route, stream):
    pool = pools(FIRST)
    handoff = by(workers(FIRST).ask(publish, FIRST, MIB), route)
    sizes = {meta.name: meta.spec.nbytes for meta in handoff.tensors}
    keys = [AttemptKey(f"{route} {stream.__name__}", number) for number in range(2)]
    for key in keys:
        pool.reserve(key, sizes)
    pool.pull(keys[0], handoff)  # kernels are loaded at their first use, and that waits
    end = busy(stream())
    pulled = pool.pull(keys[1], handoff)
    assert not end.query(), "the pull ended only after the kernel"
    assert pool.route(handoff) == route
    end.synchronize()
    assert torch.equal(pulled["large"].cpu(), make_tensors(MIB)["large"])
    for key in keys:
        pool.release(key)


def test_publish_waits_for_its_own_stream_and_no_other(pools, busy):
    pool, own = pools(FIRST), side_stream()
    with torch.cuda.stream(own):
        publish(pool, FIRST, MIB)
        tensors = {name: tensor.to(FIRST) for name, tensor in make_tensors(MIB).items()}
        pool.reserve(key := AttemptKey("published beside a kernel", 0), {n: t.nbytes for n, t in tensors.items()})
        other = busy(side_stream())
        pool.publish(key, tensors)
        assert not other.query(), "publish waited for another stream"
        other.synchronize()
        late = torch.zeros(MIB, dtype=torch.uint8, device=FIRST)
        busy(own)
        late += 1
        pool.reserve(key, {"late": late.nbytes})
        handoff = pool.publish(key, {"late": late})
    reader = pools("cpu")
    reader.reserve(key, {"late": late.nbytes})
    assert bool((reader.pull(key, handoff)["late"] == 1).all())
    for used in (pool, reader):
        used.release(key)

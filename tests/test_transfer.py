"""Pulls between two processes, over Mooncake on loopback."""

import itertools
import json
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import free_ports
from peer import HOST, TRANSPORT, Peer, flip_bit, make_tensors, publish

from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import ConfigError, PoolError, TransferError
from disagg_ray.transfer import routes
from disagg_ray.transfer.engine import TIMED_OUT
from disagg_ray.transfer.handoff import AttemptKey, Handoff, TensorMeta
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import HEADER_BYTES, slot_bytes

_attempts = itertools.count()


@pytest.fixture(scope="module")
def running() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def peer(running: Peer) -> Peer:
    """Give a peer that has just published anew; tests that kill or stop one start their own."""
    running.handoff = running.ask(publish)
    return running


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[bool, Pool]]:
    """Give a pool with checksums and one without; an engine takes a second to end, so tests share them."""
    pools = {verify: Pool("puller", 8 << 20, HOST, replace(TRANSPORT, verify=verify)) for verify in (True, False)}
    yield pools
    for pool in pools.values():
        pool.close()


def until_empty(pool: Pool) -> Iterator[Pool]:
    """Give a pool, and find it empty again after the test."""
    pool.memory.data.zero_()
    yield pool
    for key in list(pool.slots):
        pool.release(key)
    assert (pool.bytes_in_use, pool.bytes_quarantined) == (0, 0)


@pytest.fixture
def verified(pools: dict[bool, Pool]) -> Iterator[Pool]:
    yield from until_empty(pools[True])


@pytest.fixture
def unverified(pools: dict[bool, Pool]) -> Iterator[Pool]:
    yield from until_empty(pools[False])


@pytest.fixture(params=["verified", "unverified"])
def pool(request: pytest.FixtureRequest) -> Pool:
    """Give a pool, once with checksums and once without."""
    return request.getfixturevalue(request.param)


def pull(pool: Pool, handoff: Handoff, key: AttemptKey | None = None) -> dict[str, torch.Tensor]:
    key = key or AttemptKey("pulling", next(_attempts))
    pool.reserve(key, {meta.name: meta.spec.nbytes for meta in handoff.tensors}, timeout_s=0)
    return pool.pull(key, handoff)


def assert_whole(pulled: dict[str, torch.Tensor]) -> None:
    expected = make_tensors()
    assert pulled.keys() == expected.keys()
    assert all(torch.equal(pulled[name], tensor) for name, tensor in expected.items())


def assert_refused(pool: Pool, handoff: Handoff, match: str) -> TransferError:
    """Check that a pull fails before its time is up, which would be said, and says of whom and how much."""
    with pytest.raises(TransferError, match=match) as raised:
        pull(pool, handoff)
    assert raised.value.code != TIMED_OUT
    assert raised.value.session == handoff.sessions[0].name
    assert f"session {raised.value.session}, {raised.value.nbytes} bytes, code {raised.value.code}" in str(raised.value)
    assert pool.bytes_quarantined == 0
    return raised.value


def meta_of(handoff: Handoff, name: str) -> TensorMeta:
    return next(meta for meta in handoff.tensors if meta.name == name)


def only(handoff: Handoff, name: str, **changes: Any) -> Handoff:
    """Return a handoff of one tensor alone, edited."""
    return replace(handoff, tensors=(replace(meta_of(handoff, name), **changes),))


def resized(handoff: Handoff, name: str, nbytes: int) -> Handoff:
    return only(handoff, name, spec=replace(meta_of(handoff, name).spec, nbytes=nbytes))


def test_tensors_of_another_process_arrive_whole(peer, pool):
    assert_whole(pull(pool, peer.handoff))


def test_handoff_is_small_and_survives_pickling(peer, pool):
    carried = pickle.dumps(peer.handoff)
    assert len(carried) < 2048
    assert_whole(pull(pool, pickle.loads(carried)))


def test_corrupted_byte_is_an_error(peer, verified):
    latents = meta_of(peer.handoff, "latents")
    peer.ask(flip_bit, latents.address)
    error = assert_refused(verified, peer.handoff, "latents arrived damaged: its checksum differs")
    assert (error.nbytes, error.code) == (latents.spec.nbytes, 0)


def test_corrupted_byte_passes_where_checksums_are_off(peer, unverified):
    latents = meta_of(peer.handoff, "latents")
    peer.ask(flip_bit, latents.address)
    pulled = pull(unverified, peer.handoff)["latents"]
    assert (pulled != make_tensors()["latents"]).sum() == 1


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_wrong_length_within_the_peers_pool_is_an_error(peer, pool, change):
    nbytes = meta_of(peer.handoff, "frames").spec.nbytes + change
    error = assert_refused(pool, resized(peer.handoff, "frames", nbytes), "frames (arrived damaged|is not as long)")
    assert (error.nbytes, error.code) == (nbytes, 0)


def test_wrong_shape_of_the_right_length_is_damage(peer, verified):
    spec = replace(meta_of(peer.handoff, "frames").spec, shape=(104,), nbytes=104)
    assert_refused(verified, only(peer.handoff, "frames", spec=spec), "frames arrived damaged")


def test_length_beyond_the_peers_pool_is_refused(peer, pool):
    error = assert_refused(pool, resized(peer.handoff, "latents", 4 << 20), "gone or refused the read")
    assert (error.nbytes, error.code) == ((4 << 20) + HEADER_BYTES, -1)


@pytest.mark.parametrize("address", [4096, -4096, 1 << 60])
def test_address_outside_of_registered_memory_is_refused(peer, pool, address):
    outside = address if address > 0 else meta_of(peer.handoff, "prompt_embeds").address + address
    error = assert_refused(pool, only(peer.handoff, "latents", address=outside), "gone or refused the read")
    assert error.code == -1


def test_nothing_is_written_after_a_pull_was_refused(peer, pool):
    bad, *rest = peer.handoff.tensors
    assert_refused(pool, replace(peer.handoff, tensors=(replace(bad, address=4096), *rest)), "refused the read")
    time.sleep(0.1)
    assert not pool.memory.data.any()


def test_republished_tensors_make_the_old_handoff_stale(peer, pool):
    old, new = peer.handoff, peer.ask(publish)
    assert [meta.address for meta in old.tensors] == [meta.address for meta in new.tensors]
    error = assert_refused(pool, old, "prompt_embeds is stale: its producer restarted or reused the slot")
    assert error.code == 0
    assert_whole(pull(pool, new))


def test_handoff_is_stale_after_a_restart_on_the_same_port_at_the_same_address(pool):
    ports = free_ports(3)  # one of them is for its name, at random: some restarts until it is the same
    dead: dict[tuple[str, int], Handoff] = {}
    for _ in range(20):
        with Peer(ports) as peer:
            place = peer.session, peer.handoff.tensors[0].address
            if place in dead:
                assert_refused(pool, dead[place], "is stale")
                return
        dead[place] = peer.handoff
    raise AssertionError(f"no restart came to lie where an earlier process was: {list(dead)}")


def test_pool_knows_the_sessions_it_has_pulled_from(peer, verified):
    assert_whole(pull(verified, peer.handoff))
    assert peer.session in verified.met


def test_peer_whose_every_port_was_a_dead_ones_gets_a_name_of_its_own(verified):
    ports = free_ports(3)
    first, last = map(int, ports.split("-"))
    dead = {f"{HOST}:{zeros}{port}" for port in range(first, last + 1) for zeros in ("", "0")}
    with Peer(ports, verified.met | dead) as peer:
        assert peer.session in {f"{HOST}:00{port}" for port in range(first, last + 1)}
        assert_whole(pull(verified, peer.handoff))


def test_dead_peer_is_noticed_at_once(pool):
    with Peer() as peer:
        peer.kill()
        assert assert_refused(pool, peer.handoff, "the peer is gone").code < 0


def test_peer_that_died_after_a_pull_is_noticed_at_once(pool):
    with Peer() as peer:
        assert_whole(pull(pool, peer.handoff))
        peer.kill()
        assert assert_refused(pool, peer.handoff, "the peer is gone").code == -1


@pytest.mark.slow
def test_peer_that_hung_before_first_contact_times_out_and_holds_nobody_up(peer, verified):
    with ThreadPoolExecutor() as workers, Peer() as hung:
        hung.stop()
        started = time.monotonic()
        failing = workers.submit(pull, verified, hung.handoff)
        time.sleep(0.1)
        assert_whole(pull(verified, peer.handoff))
        assert not failing.done()
        error = failing.exception()
    assert isinstance(error, TransferError)
    assert time.monotonic() - started >= TRANSPORT.timeout_s
    assert (error.session, error.code) == (hung.session, TIMED_OUT)
    assert error.nbytes > sum(tensor.nbytes for tensor in make_tensors().values())
    assert verified.bytes_quarantined == 0, "nothing was asked of it, so nothing may still arrive"


@pytest.mark.slow
def test_destination_of_a_pull_from_a_peer_that_hung_is_kept_until_it_is_dead(verified):
    key = AttemptKey("hanging", 0)
    with Peer() as peer:
        handoff = only(peer.handoff, "latents")
        pull(verified, handoff, before := AttemptKey("pulling", next(_attempts)))
        verified.release(before)
        peer.stop()
        started = time.monotonic()
        with pytest.raises(TransferError, match=rf"no answer within transport\.timeout_s \(session {peer.session}, "):
            pull(verified, handoff, key)
        assert time.monotonic() - started >= TRANSPORT.timeout_s
        assert_kept(verified, key, slot_bytes(handoff.nbytes))
    verified.forget("another:1")
    assert verified.bytes_in_use > 0
    verified.forget(peer.session)


def test_destination_of_a_pull_is_free_when_its_peer_was_declared_dead_before_it_ended(verified):
    key = AttemptKey("hanging", 1)
    with Peer() as peer:
        handoff = only(peer.handoff, "latents")
        pull(verified, handoff, before := AttemptKey("pulling", next(_attempts)))
        verified.release(before)
        peer.stop()
        verified.forget(peer.session)
        with pytest.raises(TransferError, match=r"no answer within transport\.timeout_s"):
            pull(verified, handoff, key)
        verified.release(key)
        assert (verified.bytes_quarantined, verified.bytes_in_use) == (0, 0)


def assert_kept(pool: Pool, key: AttemptKey, nbytes: int) -> None:
    """Check that releasing a key frees nothing, and that nobody else gets its memory."""
    pool.release(key)
    assert pool.bytes_quarantined == pool.bytes_in_use == nbytes
    rest, filling = pool.capacity - nbytes, AttemptKey("filling", 0)
    with pytest.raises(PoolError, match="no room"):
        pool.reserve(filling, {"x": rest}, timeout_s=0)
    pool.reserve(filling, {"x": rest - HEADER_BYTES}, timeout_s=0)
    assert pool.bytes_in_use == pool.capacity
    pool.release(filling)


def test_ports_lie_in_the_given_range():
    ports = free_ports(6)
    first, last = map(int, ports.split("-"))
    with Peer(ports) as peer:
        listening = [c.laddr.port for c in psutil.Process(peer.pid).net_connections("tcp") if c.status == "LISTEN"]
        assert len(listening) == 3
        assert int(peer.session.rpartition(":")[2]) in listening
        assert all(first <= port <= last for port in listening)


@pytest.fixture
def no_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "INFINIBAND", tmp_path / "none")


@pytest.mark.usefixtures("no_rdma")
def test_rdma_is_refused_where_there_is_no_device_for_it():
    with pytest.raises(ConfigError, match=r"transport\.protocol: 'rdma' cannot be used on .*; write auto"):
        Pool("puller", 1024, HOST, TransportConfig(protocol="rdma", timeout_s=5))


@pytest.fixture
def mooncake_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mooncake.json"
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(path))
    return path


@pytest.mark.usefixtures("no_rdma")
def test_mooncake_file_is_honoured(mooncake_file):
    mooncake_file.write_text(json.dumps({"protocol": "rdma", "device_name": "none0", "local_hostname": "ignored"}))
    with pytest.raises(ConfigError, match=r"'rdma' cannot be used .* MOONCAKE_CONFIG_PATH names"):
        Pool("puller", 1024, HOST, TransportConfig(timeout_s=5))


def test_mooncake_file_gives_the_metadata_server_and_device(mooncake_file):
    mooncake_file.write_text(json.dumps({"metadata_server": "http://127.0.0.1:1/metadata", "device_name": "none0"}))
    with pytest.raises(TransferError, match=r"device_name='none0' metadata_server=http://127\.0\.0\.1:1/metadata"):
        Pool("puller", 1024, HOST, TRANSPORT)


@pytest.mark.usefixtures("no_rdma")
def test_our_configuration_wins_over_the_mooncake_file(mooncake_file):
    mooncake_file.write_text(json.dumps({"protocol": "rdma", "metadata_server": "P2PHANDSHAKE"}))
    transport = TransportConfig(protocol="tcp", timeout_s=5)
    assert Pool("puller", 1024, HOST, transport).sessions[0].route == "tcp"


@pytest.mark.parametrize(("text", "reason"), [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "JSON object")])
def test_unreadable_mooncake_file_is_an_error(mooncake_file, text, reason):
    if text is not None:
        mooncake_file.write_text(text)
    with pytest.raises(ConfigError, match=rf"MOONCAKE_CONFIG_PATH: '{mooncake_file}' .*{reason}"):
        Pool("puller", 1024, HOST, TRANSPORT)

"""The driver's own pool while a decoder hangs that raw frames come from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import HOST, connect_stages, wait_until
from peer import Peer, fill

from disagg_ray import load_config
from disagg_ray.driver.pool import NUM_COPIES, DriverPool
from disagg_ray.errors import Cancelled, PoolError, TransferError
from disagg_ray.graph import FRAMES, build_graph
from disagg_ray.transfer.handoff import AttemptKey, Handoff


@pytest.fixture
def driver_pool() -> Iterator[DriverPool]:
    config = load_config("conf/tiny_t2v.yaml", "transport.timeout_s=5", "failures.stall_s=10")
    stages = connect_stages(config)
    graph = build_graph([stage.ports for stage in stages.values()])
    with closing(DriverPool("driver", config, graph, stages["decoder"].geometry, HOST, frozenset())) as driver_pool:
        yield driver_pool


def frames_of(peer: Peer) -> Handoff:
    """Return what a decoder says of a piece of raw frames; the bytes are others."""
    (meta,) = (meta for meta in peer.handoff.tensors if meta.name == "latents")
    return replace(peer.handoff, tensors=(replace(meta, name=FRAMES),))


def pull(driver_pool: DriverPool, piece: Handoff, times: int) -> list[object]:
    """Pull as often at once; return what comes of each."""

    async def all_at_once() -> list[object]:
        into = np.empty((1, 16, 3, 8, 8), np.float32)
        return await asyncio.gather(
            *(driver_pool.pull_frames(piece, into) for _ in range(times)), return_exceptions=True
        )

    return asyncio.run(all_at_once())


def test_copies_go_on_when_threads_could_not_be_started_for_a_while(
    driver_pool: DriverPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        tensors = {"image": torch.zeros(8)}
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            for number in range(NUM_COPIES):
                with pytest.raises(RuntimeError, match="new thread"):
                    await driver_pool.publish(AttemptKey("refused", number), tensors)
        async with asyncio.timeout(60):
            await driver_pool.publish(AttemptKey("taken", 0), tensors)

    asyncio.run(run())


def test_a_copy_that_is_given_up_ends_its_wait_for_room_and_one_that_has_room_goes_on(driver_pool: DriverPool) -> None:
    async def run(peer: Peer) -> None:
        held, waiting = AttemptKey("held", 0), AttemptKey("waiting", 0)
        await driver_pool.hold(held, peer.handoff)
        driver_pool.give_up(held)
        pool = driver_pool._pool
        fill(pool)
        copying = asyncio.ensure_future(driver_pool.hold(waiting, peer.handoff))
        while not pool.num_waiting:
            await asyncio.sleep(0.01)
        driver_pool.give_up(waiting)
        with pytest.raises(Cancelled):
            await asyncio.wait_for(copying, 60)
        assert not pool.is_released(held)

    with Peer() as peer:
        asyncio.run(run(peer))


@pytest.mark.slow
def test_closing_ends_more_pulls_from_a_hung_decoder_than_there_are_slots(driver_pool: DriverPool) -> None:
    with Peer() as peer, ThreadPoolExecutor(1) as thread:
        piece = frames_of(peer)
        assert pull(driver_pool, piece, 1) == [None]
        peer.stop()
        pulling = thread.submit(pull, driver_pool, piece, NUM_COPIES)
        wait_until(driver_pool.free_pieces.empty, "nothing is pulled", 180)
        driver_pool.close()
        assert all(isinstance(error, TransferError | PoolError) for error in pulling.result(180))


@pytest.mark.proof
def test_pulls_from_a_hung_decoder_end_and_its_slots_are_used_again_once_it_is_dead(driver_pool: DriverPool) -> None:
    with Peer() as peer:
        piece = frames_of(peer)
        assert pull(driver_pool, piece, 1) == [None]
        peer.stop()
        assert all(isinstance(error, TransferError) for error in pull(driver_pool, piece, NUM_COPIES))
    driver_pool.forget((peer.session,))
    with Peer() as other:
        assert pull(driver_pool, frames_of(other), NUM_COPIES) == [None] * NUM_COPIES
    driver_pool.close()

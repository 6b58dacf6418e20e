"""Replicas that wait for their next start, and stages that have none left."""

import asyncio

from disagg_ray.driver.outages import Backoff, Outages
from disagg_ray.errors import DisaggError


def test_a_replica_that_does_not_start_pauses_longer_each_time_until_it_is_retried():
    async def run() -> list[float]:
        backoff, pauses = Backoff(), []
        await backoff.pause()
        for _ in range(9):
            backoff.num_failures += 1
            pauses.append(backoff.pause_s)
        pausing = asyncio.ensure_future(backoff.pause())
        await asyncio.sleep(0)
        assert not pausing.done()
        backoff.retry_now()
        await pausing
        return [*pauses, backoff.pause_s]

    assert asyncio.run(run()) == [1, 2, 4, 8, 16, 32, 60, 60, 60, 0]


def test_a_stage_without_a_replica_fails_by_name_after_its_time_and_serves_again_when_one_comes():
    told: list[DisaggError | None] = []

    async def run() -> None:
        outages = Outages(["encoder", "transformer"], told.append)
        outages.end("encoder")
        outages.begin("transformer")
        outages.reasons["transformer"] = "no memory"
        await outages.limit("encoder", 0.01)
        assert not told
        await outages.limit("transformer", 0.01)
        outages.report("transformer", "again")
        outages.end("transformer")

    asyncio.run(run())
    assert [str(reason) for reason in told] == [
        "no replica of transformer is left and none started within cluster.start_timeout_s=0.01 s: no memory", "None",
    ]  # fmt: skip


def test_an_outage_that_ends_at_its_limit_fails_nothing():
    told: list[DisaggError | None] = []

    async def run() -> None:
        outages = Outages(["decoder"], told.append)
        outages.begin("decoder")
        limit = asyncio.ensure_future(outages.limit("decoder", 0.0))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(outages.end, "decoder")
        await limit

    asyncio.run(run())
    assert not told

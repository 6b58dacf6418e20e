"""Who may start: the bound of the queue, the order at the gate, and who enters when several things happen at once."""

from __future__ import annotations

import asyncio

import pytest

from disagg_ray.errors import Overloaded, StartError
from disagg_ray.scheduling.admission import Admission, Ticket


async def enter_in_background(admission: Admission, priority: int, sequence: int) -> asyncio.Task[Ticket]:
    entering = asyncio.create_task(admission.enter(priority, sequence))
    await asyncio.sleep(0)
    return entering


def test_a_full_queue_refuses_and_a_closed_one_says_why() -> None:
    async def use() -> None:
        admission = Admission(max_queued=1, capacity=1)
        await admission.queue("first", wait=False)
        with pytest.raises(Overloaded, match=r"limits\.max_queued: 1 requests wait already"):
            await admission.queue("second", wait=False)
        waiting = asyncio.create_task(admission.queue("third", wait=True))
        await asyncio.sleep(0)
        admission.close(StartError("no decoder is left"))
        admission.close()
        for refused in waiting, admission.queue("fourth", wait=True):
            with pytest.raises(StartError, match="no decoder is left"):
                await asyncio.wait_for(refused, 60)

    asyncio.run(use())


def test_a_place_that_is_left_is_taken_by_one_that_waits() -> None:
    async def use() -> None:
        admission = Admission(max_queued=1, capacity=1)
        await admission.queue("first", wait=True)
        waiting = [asyncio.create_task(admission.queue(ticket, wait=True)) for ticket in ("second", "third")]
        await asyncio.sleep(0)
        admission.leave_queue("first")
        await asyncio.wait_for(waiting[0], 60)
        assert not waiting[1].done()
        admission.leave_queue("second")
        await asyncio.wait_for(waiting[1], 60)

    asyncio.run(use())


def test_higher_priority_enters_first() -> None:
    async def use() -> list[bool]:
        admission = Admission(max_queued=9, capacity=1)
        first = await admission.enter(0, 0)
        late = await enter_in_background(admission, 0, 1)
        urgent = await enter_in_background(admission, 5, 2)
        admission.leave(first)
        second = await asyncio.wait_for(urgent, 60)
        waited = late.done()
        admission.leave(second)
        await asyncio.wait_for(late, 60)
        return [waited]

    assert asyncio.run(use()) == [False]


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_capacity_is_neither_lost_nor_doubled_when_one_is_cancelled_as_another_leaves(cancelled_first: bool) -> None:
    async def use() -> None:
        admission = Admission(max_queued=9, capacity=1)
        first = await admission.enter(0, 0)
        waiting = await enter_in_background(admission, 0, 1)
        if cancelled_first:
            waiting.cancel()
        admission.leave(first)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(admission.enter(0, 2), 60)
        following = await enter_in_background(admission, 0, 3)
        assert not following.done()
        following.cancel()

    asyncio.run(use())


def test_a_cancelled_request_keeps_no_other_out() -> None:
    async def use() -> None:
        admission = Admission(max_queued=9, capacity=0)
        waiting = await enter_in_background(admission, 0, 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        following = await enter_in_background(admission, 0, 2)
        admission.resize(1)
        await asyncio.wait_for(following, 60)

    asyncio.run(use())


def test_a_smaller_gate_lets_none_in_until_enough_have_left() -> None:
    async def use() -> None:
        admission = Admission(max_queued=9, capacity=2)
        inside = [await admission.enter(0, number) for number in range(2)]
        admission.resize(1)
        waiting = await enter_in_background(admission, 0, 2)
        admission.leave(inside[0])
        await asyncio.sleep(0)
        assert not waiting.done()
        admission.leave(inside[1])
        await asyncio.wait_for(waiting, 60)

    asyncio.run(use())


def test_a_client_with_less_inside_goes_first() -> None:
    async def use() -> None:
        admission = Admission(max_queued=9, capacity=2)
        inside = [await admission.enter(0, number, "greedy", lambda: 1.0) for number in range(2)]
        greedy = asyncio.create_task(admission.enter(0, 2, "greedy"))
        modest = asyncio.create_task(admission.enter(0, 3, "modest"))
        await asyncio.sleep(0)
        admission.leave(inside[0])
        await asyncio.wait_for(modest, 60)
        assert not greedy.done()
        greedy.cancel()

    asyncio.run(use())

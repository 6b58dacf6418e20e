"""Handles of submitted requests."""

import asyncio

import pytest

from disagg_ray.config.load import load_config
from disagg_ray.driver.handle import Handle, gather
from disagg_ray.errors import Cancelled, StageError
from disagg_ray.request import Request, ResolvedRequest, resolve
from disagg_ray.result import Result


@pytest.fixture(scope="module")
def resolved() -> ResolvedRequest:
    return resolve(Request("a red circle"), load_config("conf/tiny_t2v.yaml"))[0]


def test_a_cancelled_request_does_not_stop_the_others(resolved: ResolvedRequest) -> None:
    """As when somebody cancels it from elsewhere."""
    result, ends = Result(resolved, 1.0, (), b"", None), iter(("cancelled", "failed", "done"))

    def submit(_: Request) -> Handle:
        handle, end = Handle(resolved), next(ends)
        if end == "cancelled":
            handle.cancel()
            handle.future.set_running_or_notify_cancel()  # as the event loop does when the request has ended
        elif end == "failed":
            handle.future.set_exception(StageError("no"))
        else:
            handle.future.set_result(result)
        return handle

    done = []
    with pytest.raises(Cancelled) as caught:
        for each in gather(submit, [Request("a")] * 3, window=1):
            done.append(each)
    assert done == [result]
    assert caught.value.__notes__ == ["another request failed too: no"]


def test_who_stops_early_cancels_the_rest(resolved: ResolvedRequest) -> None:
    handles = [Handle(resolved) for _ in range(3)]
    handles[1].future.set_result(Result(resolved, 1.0, (), b"", None))
    left = iter(handles)
    results = gather(lambda _: next(left), [Request("a")] * 3, window=3)
    next(results)
    results.close()
    assert [handle.future.cancelled() for handle in handles] == [True, False, True]


def test_who_awaits_a_request_that_another_cancels_is_told_so(resolved: ResolvedRequest) -> None:
    async def wait(handle: Handle) -> Result:
        asyncio.get_running_loop().call_later(0.01, handle.cancel)
        return await handle

    with pytest.raises(Cancelled, match=f"request {resolved.id} was cancelled"):
        asyncio.run(wait(Handle(resolved)))


def test_who_is_cancelled_while_awaiting_a_request_cancels_it(resolved: ResolvedRequest) -> None:
    handle = Handle(resolved)

    async def wait() -> None:
        async with asyncio.timeout(0.01):
            await handle

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert handle.future.cancelled()

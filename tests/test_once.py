"""Calls that are made again are worked at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from disagg_ray.errors import StageError
from disagg_ray.replica.once import NUM_KEPT, Once


def test_a_call_that_is_made_again_gets_the_first_answer_until_it_is_forgotten():
    once, answers = Once(), iter(range(9))
    assert [once.answer("run", "key", lambda: next(answers)) for _ in range(3)] == [0, 0, 0]
    assert once.answer("encode", "key", lambda: next(answers)) == 1
    once.forget("key")
    assert once.answer("run", "key", lambda: next(answers)) == 2


def test_a_call_that_is_made_again_meanwhile_waits_for_the_first():
    once, begun, go = Once(), threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert go.wait(60)
        once.forget("key")  # as a task that fails is released
        return "first"

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(once.answer, "pull", "key", work)
        assert begun.wait(60)
        again = threads.submit(once.answer, "pull", "key", lambda: "again")
        go.set()
        assert (first.result(60), again.result(60)) == ("first", "first")


def test_a_failure_is_told_again_without_what_it_holds_and_not_for_ever():
    once = Once()
    with pytest.raises(RuntimeError, match="broken"):
        once.answer("run", 0, lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(StageError, match="RuntimeError: broken"):
        once.answer("run", 0, lambda: "not asked")
    for key in range(1, NUM_KEPT + 1):
        once.answer("run", key, lambda: None)
    assert once.answer("run", 0, lambda: "asked") == "asked"

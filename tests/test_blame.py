"""Who is at fault: the rules, without a cluster."""

import pytest
import torch

from disagg_ray.errors import StageError
from disagg_ray.scheduling.blame import MAX_PAUSE_S, Ledger, pause_s, poisons


def ledger_of(*replicas: str, sound: str = "") -> Ledger:
    ledger = Ledger()
    for name in replicas:
        ledger.add(name)
    for name in sound:
        ledger.succeed(name)
    return ledger


def test_a_replica_that_fails_two_requests_in_a_row_is_broken():
    ledger = ledger_of("a", "b", sound="ab")
    assert ledger.fail("a", "r1", set()) == []
    assert ledger.fail("a", "r2", set()) == ["a"]
    assert ledger.is_fruitful("a")
    ledger.remove("a")
    assert ledger.fail("a", "r3", set()) == []


def test_a_success_between_two_failures_clears_it():
    ledger = ledger_of("a", sound="a")
    ledger.fail("a", "r1", set())
    assert ledger.succeed("a") == []
    assert ledger.fail("a", "r2", set()) == []


def test_one_request_that_fails_everywhere_costs_no_replica():
    ledger = ledger_of("a", "b", sound="ab")
    assert ledger.fail("a", "bad", set()) == []
    assert ledger.fail("b", "bad", {"a"}) == []
    assert ledger.fail("a", "bad", {"a", "b"}) == []
    assert ledger.fail("a", "worse", set()) == []  # b, which was sound, has spoken for a
    assert ledger.fail("b", "worse", {"a"}) == []


def test_two_replicas_that_break_at_once_are_both_found():
    ledger = ledger_of("a", "b", sound="ab")
    ledger.fail("a", "r1", set())
    ledger.fail("b", "r2", set())
    ledger.fail("b", "r1", {"a"})
    ledger.fail("a", "r2", {"b"})
    assert ledger.fail("a", "r3", set()) == ["a"]
    ledger.remove("a")
    assert ledger.fail("b", "r4", set()) == ["b"]


def test_what_has_never_worked_is_not_replaced_until_it_works_elsewhere():
    ledger = ledger_of("a", "b")
    for number in range(5):
        assert ledger.fail("a", f"r{number}", set()) == []
    assert ledger.succeed("b") == ["a"]
    assert not ledger.is_fruitful("a")
    ledger.remove("a")
    ledger.add("a2")
    assert [ledger.fail("a2", name, set()) for name in ("r6", "r7")] == [[], []]


@pytest.mark.parametrize("message", [
    "CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered",
    "CUDA error: uncorrectable ECC error encountered", "CUDA error: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR",
])  # fmt: skip
def test_an_error_that_poisons_cuda_is_known(message):
    assert poisons(RuntimeError(message))
    try:
        raise StageError("x") from RuntimeError(message)
    except StageError as error:
        assert poisons(error)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("prompt: 'CUDA error' is too long"), StageError("a request about a CUDA error"),
])  # fmt: skip
def test_an_error_that_leaves_cuda_as_it_was_is_not_taken_for_one_that_poisons(error):
    assert not poisons(error)


def test_an_accelerator_error_poisons_whatever_it_says():
    assert poisons(torch.AcceleratorError("launch timed out and was terminated"))


def test_a_post_stays_closed_longer_each_time_and_never_for_good():
    assert [pause_s(number) for number in (0, 1, 2, 3, 1000)] == [0, 1, 2, 4, MAX_PAUSE_S]

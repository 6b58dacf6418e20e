"""What a batch came to, in numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from disagg_ray.batch.summary import StageShare, Summary, bottleneck


def share(stage: str, num_replicas: int, mean_s: float) -> StageShare:
    return StageShare(stage, num_replicas, mean_s, 0.5)


@pytest.mark.parametrize(
    ("shares", "stage", "speedup"),
    [
        ((share("encoder", 1, 1.0), share("transformer", 1, 10.0), share("decoder", 1, 2.0)), "transformer", 2.0),
        ((share("encoder", 1, 1.0), share("transformer", 4, 10.0), share("decoder", 1, 2.0)), "transformer", 1.25),
        ((share("encoder", 1, 1.0), share("transformer", 4, 10.0), share("decoder", 1, 2.4)), "transformer", 2.5 / 2.4),
        ((share("encoder", 1, 1.0), share("transformer", 9, 9.0), share("decoder", 1, 2.0)), "decoder", 2.0),
        ((share("encoder", 1, 0.1), share("transformer", 2, 4.0), share("decoder", 1, 2.0)), "transformer", 1.0),
        ((share("fused", 3, 4.0),), "fused", 4 / 3),
    ],
)
def test_one_more_replica_helps_until_the_next_stage_is_the_slowest(
    shares: tuple[StageShare, ...], stage: str, speedup: float
) -> None:
    assert bottleneck(shares) == (stage, pytest.approx(speedup))


def test_nothing_made_has_no_bottleneck() -> None:
    assert bottleneck((share("encoder", 1, 0.0),)) is None


@pytest.mark.parametrize(
    ("changed", "complete"),
    [({}, True), ({"failed": 1}, False), ({"invalid": 1}, False), ({"missing": 1}, False), ({"stopped": "x"}, False)],
)
def test_only_a_batch_with_every_request_done_is_complete(changed: dict[str, object], complete: bool) -> None:
    given = {"done": 3, "already_done": 2, "failed": 0, "invalid": 0, "missing": 0, "retried": 1, "stopped": None}
    summary = Summary(**(given | changed), seconds=90.0, shares=(), makes="image")  # type: ignore[arg-type]
    assert summary.complete is complete
    assert "2.00 images a minute" in summary.lines()[0]


@pytest.mark.parametrize(
    ("failed", "says"),
    [(0, "everything is there already"), (1, "nothing was made; --retry-failed tries again what failed")],
)
def test_a_run_with_nothing_to_do_says_so(failed: int, says: str) -> None:
    (line,) = Summary(0, 2, failed, 0, 0, 0, 0.0, (), None, "video").lines()
    assert line.endswith(f"0 retried; {says}")

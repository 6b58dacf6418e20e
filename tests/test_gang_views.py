"""How gangs are shown: the list of services, and what a request's result prints."""

from __future__ import annotations

import time

import pytest
from runs import REQUEST, simulate

from disagg_ray.config.load import load_config
from disagg_ray.replica.messages import RankInfo, ReplicaInfo
from disagg_ray.report.tables import print_result, print_services, services_to_json
from disagg_ray.result import Result
from disagg_ray.service.protocol import Snapshot, StageState

RANKS = (RankInfo(0, 11, "cuda", "10.0.0.1", "3"), RankInfo(1, 12, "cuda", "10.0.0.1", "4"))


def snapshot() -> Snapshot:
    """Return a service whose transformer is a gang of two."""
    config = load_config("conf/tiny_t2v.yaml", "stages.transformer.parallel.cfg=2")
    info = ReplicaInfo("transformer-0", "transformer", "10.0.0.1", 11, "cuda", 1, 1, {}, (), 1.0, 0.0, {}, RANKS)
    stages = tuple(StageState(name, 1, 1, 0, 0, 0) for name in config.stages)
    began = time.time() + 86400  # by a clock that is a day ahead
    return Snapshot("wan", "ready", config, began, 60.0, "10.0.0.1", 1, stages=stages, replicas=(info,))


def test_ls_says_where_the_ranks_of_a_gang_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_services({"wan": snapshot()})
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 ranks each" in shown
    assert "wan transformer-0: rank 0 on 10.0.0.1 GPU 3, pid 11; rank 1 on 10.0.0.1 GPU 4, pid 12" in shown
    assert " 1 min " in shown
    assert '"gpu": "4"' in services_to_json({"wan": snapshot()})


def test_a_result_says_how_many_gpus_a_stage_took(capsys: pytest.CaptureFixture[str]) -> None:
    ((_, timings),) = simulate(1, {"transformer": 1})
    (gang,) = [type(t)(**vars(t) | {"num_ranks": 4, "num_gpus": 4.0}) for t in timings]
    print_result(Result(REQUEST, 1.0, (gang,), b"", None), {}, {})
    assert "transformer-0, 4 GPUs" in capsys.readouterr().out

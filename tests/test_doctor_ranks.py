"""The doctor of gangs: ranks that talk, hang or find no room."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from helpers import wait_until
from ray.util import placement_group_table

from disagg_ray.config.load import load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.stages import StageConfig
from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor.check import Check
from disagg_ray.doctor.ranks import Place, RankProbe, check_ranks, judge

T = "stages.transformer"
TWO = load_config("conf/tiny_t2v.yaml", f"{T}.parallel.ulysses=2", f"{T}.num_threads=1")
HERE, THERE = Place("10.0.0.1", 1, "0", "10.0.0.1:15000"), Place("10.0.0.2", 2, "3", "10.0.0.2:15000")


def silent_probe() -> type[RankProbe]:
    """Return the class of a gang of which only the first rank comes to the rendezvous; pickled by value."""

    class SilentProbe(RankProbe):
        def talk(self, address: str, timeout_s: float) -> float:
            if self._rank:
                threading.Event().wait()
            return super().talk(address, timeout_s)

    return SilentProbe


def living_bundles() -> int:
    table: dict[str, Any] = placement_group_table()
    return sum(group["state"] != "REMOVED" for group in table.values())


@pytest.mark.slow
def test_the_ranks_of_a_gang_talk_and_leave_nothing(cluster: None) -> None:
    (check,) = check_ranks(TWO, talk_s=240)
    assert (check.name, check.status) == ("ranks", "ok")
    assert f"{T}: 2 ranks, gloo all-gather " in check.detail and "GB/s (ranks 0 on " in check.detail
    wait_until(lambda: living_bundles() == 0, "bundles are left", 60)
    assert list(check_ranks(load_config("conf/tiny_t2v.yaml"))) == []


@pytest.mark.slow
def test_a_rendezvous_that_hangs_is_reported_not_waited_for(cluster: None) -> None:
    (check,) = check_ranks(TWO, silent_probe(), talk_s=4)
    assert check.status == "fail"
    assert "do not talk by gloo: " in check.detail and "rank 1: no answer within 4 s" in check.detail
    assert "GLOO_SOCKET_IFNAME" in check.remedy
    wait_until(lambda: living_bundles() == 0, "bundles are left", 60)


@pytest.mark.slow
def test_ranks_without_room_are_a_warning(cluster: None) -> None:
    stage = replace(TWO.stages["transformer"], num_cpus=1000)
    (check,) = check_ranks(replace(TWO, stages=TWO.stages | {"transformer": stage}), room_s=0.5)
    assert (check.status, "no room on one node for 2 ranks of 1000 CPUs each" in check.detail) == ("warn", True)
    assert "parallel.spread=true" in check.remedy


def verdict(rate: float, *errors: str, port_range: str | None = None, **parallel: int) -> Check:
    settings = StageConfig(blocks=["denoise"], num_gpus=1, parallel=ParallelConfig(**parallel))
    places = {0: HERE, 1: THERE}
    return judge(
        T, settings, TransportConfig(port_range=port_range), places, {0: rate, 1: rate}, dict(enumerate(errors))
    )


def test_what_to_type_names_ports_interface_and_log() -> None:
    check = verdict(0, "timed out", port_range="15000-15999", cfg=2)
    assert "by NCCL: rank 0: timed out (ranks 0 on 10.0.0.1 GPU 0, 1 on 10.0.0.2 GPU 3)" in check.detail
    for words in ("reach ports 15000-15999 of 10.0.0.1", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG=INFO"):
        assert words in check.remedy


def test_a_slow_link_is_a_warning_where_ranks_share_tokens() -> None:
    assert verdict(100e9, ulysses=2).status == verdict(1e9, cfg=2).status == "ok"
    slow = verdict(1e9, ulysses=2)
    assert (slow.status, "1.00 GB/s" in slow.detail, "nvidia-smi topo -m" in slow.remedy) == ("warn", True, True)

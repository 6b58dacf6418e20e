"""Changes of a service's configuration: it serves whatever becomes of them."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import pytest
import ray

from disagg_ray import Connection, Request, StartError, cli, connect, load_config
from disagg_ray.driver.names import find_replicas, find_supervisor
from disagg_ray.errors import ConfigError
from disagg_ray.service import lifecycle
from disagg_ray.service.changes import check_change
from disagg_ray.service.latents_store import LatentsStore

pytestmark = pytest.mark.slow

T2V = "conf/tiny_t2v.yaml"
SMALL = Request(prompt="a red circle", seed=1, height=32, width=32, num_frames=5, num_inference_steps=1)
FLASH = "stages.transformer.denoiser.attention=flash"
"""No CPU can have it: it is found out by the replica that loads."""
MEMORY = "stages.transformer.memory=1048576"
"""Every node has it."""

wait_until = partial(helpers.wait_until, timeout_s=240.0)


@contextmanager
def service(name: str, *overrides: str) -> Iterator[tuple[list[str], Connection]]:
    """Give the command that put a service up, and a connection to it."""
    up = ["up", name, "--config", T2V, *overrides]
    assert cli.main(up) == 0
    try:
        with connect(name) as connection:
            yield up, connection
    finally:
        assert cli.main(["down", name]) == 0


def pids(connection: Connection) -> dict[str, int]:
    return {replica.name: replica.pid for replica in connection.replicas}


@pytest.mark.quick
def test_a_rollout_that_cannot_start_leaves_the_service_as_it_was(
    cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with service("steady", "fused=true") as (up, connection):
        before, serving = connection.snapshot(), pids(connection)
        assert cli.main([*up, FLASH]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("disagg-ray: error: steady stays as it was: stages.fused.denoiser.attention: ")
        after = connection.snapshot()
        assert (after.state, after.config, pids(connection)) == ("ready", before.config, serving)
        assert connection.generate(SMALL).data


def test_a_timeout_that_replicas_have_from_their_start_cannot_change() -> None:
    before, after = load_config(T2V), load_config(T2V, "failures.stall_s=5")
    with pytest.raises(ConfigError, match=r"failures\.stall_s: it cannot change while the service runs"):
        check_change(before, after)
    check_change(before, load_config(T2V, "failures.answer_s=5", "service.latents_bytes=50"))


@pytest.mark.proof
def test_a_rollout_changes_how_many_latents_are_kept(cluster: None, tmp_path: Path) -> None:
    with service("keeping", "fused=true") as (up, connection):
        kept = LatentsStore("keeping", 0, 0).file("another run", "video")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(bytes(100))
        connection.submit(SMALL, latents_file=tmp_path / "unused").result()
        assert kept.exists()
        assert cli.main([*up, "service.latents_bytes=50"]) == 0
        connection.submit(SMALL, latents_file=tmp_path / "unused").result()
        assert not kept.exists()


@pytest.mark.proof
def test_requests_that_run_through_a_rollout_all_succeed_and_it_ends_when_up_does(cluster: None) -> None:
    with service("rolled", "stages.transformer.replicas=2") as (up, connection), ThreadPoolExecutor(1) as thread:
        before, ended = pids(connection), list[bool]()

        def generate() -> int:
            for number in itertools.count():
                assert connection.generate(replace(SMALL, seed=number)).data
                if ended:
                    return number
            raise AssertionError("unreachable")

        generating = thread.submit(generate)
        try:
            assert cli.main([*up, MEMORY]) == 0
        finally:
            ended.append(True)
        assert generating.result(240) > 0
        after = pids(connection)
        assert {name for name in before if after[name] != before[name]} == {"transformer-0", "transformer-1"}
        assert connection.snapshot().config.stages["transformer"].memory == 2**20
        assert connection.num_restarts["transformer"] == 0
        supervisor = find_supervisor("rolled")
        asked = [supervisor.scale.remote(stage, 2) for stage in ("encoder", "decoder")]
        assert ray.get(asked, timeout=240) == [None, None]
        assert {stage.replicas for stage in connection.snapshot().config.stages.values()} == {2}, "one was lost"


@pytest.mark.proof
def test_without_room_for_one_more_the_old_one_is_put_back_when_the_new_one_does_not_start(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with service("tight", "fused=true", "stages.decoder.resources={disk: 2}") as (up, connection):
        before = pids(connection)
        assert cli.main([*up, FLASH]) == 2
        said = capfd.readouterr().err
        assert "fused-0: no room for one more; it ends before its successor starts, 0 others serve" in said
        assert connection.generate(SMALL).data
        assert pids(connection) != before
        assert cli.main([*up, MEMORY]) == 0
        assert connection.generate(SMALL).data


@pytest.mark.proof
def test_a_supervisor_that_dies_in_a_rollout_goes_back_to_the_configuration_in_force(cluster: None) -> None:
    with service("broken-off", "stages.transformer.replicas=2") as (up, connection), ThreadPoolExecutor(1) as thread:
        before = pids(connection)
        rolling = thread.submit(lifecycle.up, "broken-off", load_config(T2V, *up[4:], MEMORY))
        wait_until(lambda: pids(connection).get("transformer-0") != before["transformer-0"], "nothing is replaced")
        os.kill(connection.snapshot().pid, signal.SIGKILL)
        with pytest.raises(StartError, match="broken-off stays as it was: the supervisor died"):
            rolling.result(240)
        wait_until(lambda: len(find_replicas("broken-off")) == len(before), "not each post has its replica")
        wait_until(lambda: not connection.snapshot().rollout, "the rollback does not end")
        assert connection.snapshot().config.stages["transformer"].memory is None
        told = ray.get([actor.handle.state.remote() for actor in find_replicas("broken-off")])
        assert {states.config.stages["transformer"].memory for states in told} == {None}
        assert connection.generate(SMALL).data

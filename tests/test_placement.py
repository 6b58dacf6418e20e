"""Where Ray puts replicas: real actors and bundles on logical resources, with a light class in a replica's place."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray.util import placement_group_table

from disagg_ray import CheckpointError, Config, StartError, load_config
from disagg_ray.driver import calls, placement
from disagg_ray.driver.calls import Actor, gather_ready, replicas_of
from disagg_ray.driver.cluster import total_resources
from disagg_ray.driver.placement import Placement

pytestmark = pytest.mark.slow


class Where:
    """Says what Ray gave it."""

    def __init__(self, stage: str, index: int, config: Config) -> None:
        self.settings = config.stages[stage]

    def describe(self) -> tuple[str | None, dict[str, float], int]:
        assigned, group = ray.get_runtime_context().get_assigned_resources(), ray.util.get_current_placement_group()
        return None if group is None else group.id.hex(), assigned, self.settings.torch_threads


Launch = Callable[..., tuple[Config, list[Actor]]]


@pytest.fixture
def launch(cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    monkeypatch.setattr(placement, "ServedReplica", Where)
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    started: list[tuple[Placement, list[Actor]]] = []

    def launch(*overrides: str) -> tuple[Config, list[Actor]]:
        config = load_config("conf/tiny_t2v.yaml", *overrides)
        placed = Placement(f"test{len(started)}{id(started)}")
        placed.reserve(config)
        actors = [placed.launch(config, replica) for replica in replicas_of(config)]
        started.append((placed, actors))
        return config, actors

    yield launch
    for placed, actors in started:
        for actor in actors:
            actor.kill()
        placed.close()


def ask_all(config: Config, actors: list[Actor]) -> dict[str, Any]:
    answers = asyncio.run(gather_ready(config, actors, "describe"))
    return dict(zip([actor.name for actor in actors], answers, strict=True))


def test_stages_that_share_a_gpu_lie_in_one_bundle_replica_by_replica(launch: Launch) -> None:
    config, actors = launch(
        "stages.encoder={replicas: 2, num_cpus: 0.5}", "stages.decoder={replicas: 2, num_cpus: 1}",
        "share_gpu=[encoder, decoder]",
    )  # fmt: skip
    told = ask_all(config, actors)
    bundles = {name: bundle for name, (bundle, _, _) in told.items()}
    assert bundles["encoder-0"] == bundles["decoder-0"] != bundles["encoder-1"] == bundles["decoder-1"]
    assert None not in (bundles["encoder-0"], bundles["encoder-1"])
    assert bundles["transformer-0"] is None


def test_groups_of_a_stage_get_their_own_resources_and_labels(launch: Launch) -> None:
    config, actors = launch(
        "stages.transformer={num_cpus: 0.5, groups: {big: {num_cpus: 3, resources: {disk: 2}}, "
        "near: {replicas: 2, label_selector: {zone: a}}}}",
    )
    told = ask_all(config, actors)
    assert [actor.replica.group for actor in actors if actor.stage == "transformer"] == ["big", "near", "near"]
    assert told["transformer-0"][1] == {"CPU": 3.0, "disk": 2.0}
    assert [told[f"transformer-{index}"][2] for index in range(3)] == [3, 1, 1]


def test_the_bundles_of_ranks_whose_actor_is_not_created_are_given_back(cluster: None) -> None:
    config = load_config("conf/tiny_t2v.yaml", "stages.transformer.parallel.ulysses=2")
    (replica,) = (replica for replica in replicas_of(config) if replica.stage == "transformer")
    name = "disagg_ray-taken-transformer-0"
    holder: Any = ray.remote(Where).options(name=name).remote("transformer", 0, config)
    with pytest.raises(ValueError, match="already taken"):
        Placement("taken").launch(config, replica)
    (group,) = (group for group in placement_group_table().values() if group["name"] == name)
    ray.kill(holder)
    assert group["state"] == "REMOVED"


def test_a_replica_that_fits_nowhere_is_waited_for_visibly_until_the_deadline(
    launch: Launch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "NOTICE_S", 0.5)
    config, actors = launch("stages.decoder={label_selector: {zone: nowhere}}", "cluster.start_timeout_s=10")
    with caplog.at_level(logging.INFO, "disagg_ray"), pytest.raises(StartError, match=r"waiting for decoder-0.* CPU"):
        ask_all(config, actors)
    assert any(message.startswith("waiting for decoder-0") for message in caplog.messages)


def test_what_a_replicas_constructor_raises_is_the_answer_and_ends_no_process(
    cluster: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config("conf/tiny_t2v.yaml")
    config = replace(config, model=replace(config.model, path="/nonexistent/wan"))
    actors = [Placement("refused").launch(config, replica) for replica in replicas_of(config)]
    with pytest.raises(CheckpointError, match=r"^model\.path: '/nonexistent/wan' is no folder on this node"):
        ask_all(config, actors)
    assert len({ray.get(actor.handle.__ray_call__.remote(lambda _: os.getpid())) for actor in actors}) == len(actors)
    for actor in actors:
        actor.kill()
    assert "Stack trace" not in capfd.readouterr().err


def test_memory_is_reserved(launch: Launch) -> None:
    config, actors = launch("stages.decoder={memory: 1048576, placement: spread}")
    assert ask_all(config, actors)["decoder-0"][1]["memory"] == 1048576


@pytest.mark.parametrize("replicas", range(1, 65))
def test_shares_of_a_gpu_add_up_to_no_more_than_they_are(replicas: int) -> None:
    shares = {"encoder": 0.1, "transformer": 0.8, "decoder": 0.1}
    overrides = [f"stages.{stage}.{key}" for stage, share in shares.items()
                 for key in (f"num_gpus={share}", f"replicas={replicas}")]  # fmt: skip
    assert total_resources(load_config("conf/tiny_t2v.yaml", *overrides).stages)["GPU"] == replicas

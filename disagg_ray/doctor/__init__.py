"""The doctor: checks this machine, every node of a cluster, and every route between their pools."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor.check import Check, at, exit_status, fail
from disagg_ray.doctor.cluster import check_cluster, check_resources
from disagg_ray.doctor.machine import Survey, check_place, survey
from disagg_ray.doctor.memory import check_gpu_memory, check_host_memory, check_model, without_gpu
from disagg_ray.doctor.probe import Probe, check_link
from disagg_ray.doctor.ranks import check_ranks
from disagg_ray.doctor.security import check_auth
from disagg_ray.doctor.service import examine_service
from disagg_ray.doctor.table import print_checks, to_json
from disagg_ray.driver.cluster import Cluster
from disagg_ray.environment import ray_auth_mode
from disagg_ray.errors import DisaggError

__all__ = ["Check", "check_place", "examine", "examine_service", "exit_status", "print_checks", "to_json"]

logger = logging.getLogger("disagg_ray")

NO_MODEL = Config(stages={"none": StageConfig(blocks=["none"], num_cpus=0)})
"""Stands in for the configuration if none is given."""
HERE_BYTES = 16 * 2**20


def examine(config: Config | None, address: str | None, *, local: bool) -> list[Check]:
    """Make every check; without a configuration: those that need none; `local`: those of this machine.

    Joins the Ray cluster at `address`, else that of the configuration, else that of RAY_ADDRESS, or starts one here.
    """
    logger.info("doctor: checking this machine")
    settings = config or NO_MODEL
    model, needs = check_model(config) if config else ([], None)
    pool_bytes = max(need.pool_bytes for need in needs.stages) if needs else None
    here = survey(settings.transport, pool_bytes)
    checks = [*at(platform.node(), [*here.checks, *check_pools(settings.transport)]), *model]
    surveys = [here]
    if not local:
        joined = replace(settings.cluster, address=address or settings.cluster.address)
        found = list(_examine_cluster(replace(settings, cluster=joined), here, pool_bytes))
        surveys = [each for each in found if isinstance(each, Survey)] or surveys
        checks += [each for each in found if isinstance(each, Check)]
    if needs:
        checks.append(check_host_memory(needs, sum(each.host_bytes for each in surveys)))
        checks += check_gpu_memory(needs, [gpu for each in surveys for gpu in each.gpus])
    return checks


def _examine_cluster(config: Config, here: Survey, pool_bytes: int | None) -> Iterator[Check | Survey]:
    logger.info("doctor: joining Ray, or starting one")
    without_gpus = {
        name: replace(  # checked below
            without_gpu(stage), num_gpus=0, num_cpus=stage.num_cpus or 1, accelerator_type=None, groups={}
        )
        for name, stage in config.stages.items()
    }
    try:
        cluster = Cluster(replace(config, stages=without_gpus))
    except DisaggError as error:
        yield fail("ray", str(error), "ray status, on the head node; or leave --address and RAY_ADDRESS out")
        return
    with closing(cluster):
        yield check_auth(ray_auth_mode())
        yield from check_resources(config.stages)
        yield from check_cluster(config, here, pool_bytes)
        yield from check_ranks(config)


def check_pools(transport: TransportConfig) -> Iterator[Check]:
    """Open two pools in this process, as the driver opens one, and pull from one into the other."""
    producer, consumer = (Probe(f"this process/{index}", transport, "cpu") for index in range(2))
    try:
        handoff = producer.open("127.0.0.1", HERE_BYTES).handoff
        consumer.open("127.0.0.1", HERE_BYTES)
        yield replace(check_link(consumer.link(handoff), transport), name="pool")
    except DisaggError as error:
        yield fail("pool", str(error), "correct what this says, and what failed above, first")
    finally:
        producer.close()
        consumer.close()

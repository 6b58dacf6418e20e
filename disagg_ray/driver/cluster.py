"""The Ray cluster that replicas run on: joined, or started on this machine and shut down again."""

from __future__ import annotations

import logging
import os
import secrets
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.job_config import JobConfig

from disagg_ray import environment
from disagg_ray.config.deployment import check_joining
from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.driver.address import LOCAL, STATUS, find_cluster
from disagg_ray.driver.signals import handler_kept
from disagg_ray.errors import ConfigError, StartError
from disagg_ray.models.preflight import check_model, check_temporary_folder
from disagg_ray.replica.software import PACKAGE, is_installed
from disagg_ray.text import mask, printable, shown
from disagg_ray.version import VERSION

DIGITS = 4
"""After the point, in Ray's numbers of resources: 7 x 0.1 + 7 x 0.8 + 7 x 0.1 GPUs are 7."""


def join(address: str | None) -> None:
    """Join the Ray cluster at an address, in RAY_ADDRESS, or on this machine, unless this process has joined one.

    Raises:
        ConfigError: it is no address of a cluster.
        StartError: no cluster was found, or this machine could not join it within seconds.
    """
    if ray.is_initialized():
        return
    found = find_cluster(address)
    with _start_errors(f"cluster.address: '{found}' cannot be joined", STATUS):
        ray.init(address=found, job_config=_job({}), logging_level=logging.ERROR)


@contextmanager
def _start_errors(what: str, remedy: str) -> Iterator[None]:
    """Convert what `ray.init` raises, which may be a bare Exception, and leave this process ready to try again."""
    auth_mode = environment.ray_auth_mode()
    try:
        with handler_kept():
            yield
    except Exception as error:
        if not ray.is_initialized():  # or another thread was quicker
            ray.shutdown()
            environment.replace("RAY_AUTH_MODE", auth_mode)
        reason = printable(str(error.__cause__ or error).strip()) or type(error).__name__
        raise StartError(f"{what}: {reason}; {remedy}") from error


class Cluster:
    """A Ray cluster that was joined, or started here; `close` shuts down only the latter."""

    def __init__(self, config: Config) -> None:
        self.is_own = False
        """Whether it was started here, so that all of it is on this machine."""
        self._auth_mode = environment.ray_auth_mode()
        address = config.cluster.address or environment.ray_address() or LOCAL
        check_model(config, whole=address == LOCAL and not ray.is_initialized())
        if ray.is_initialized():
            check_joining(config.cluster, "this process")
            return
        if address != LOCAL:
            check_joining(config.cluster, address)
            join(config.cluster.address)
        else:
            self._start(config)

    def _start(self, config: Config) -> None:
        """Start a cluster on this machine, which only clients with its token can join."""
        check_temporary_folder()
        _make_token()
        with _start_errors("cluster: Ray did not start on this machine", _again()):
            ray.init(address="local", logging_level=logging.ERROR, **own_cluster(config))
        self.is_own = True
        try:
            with _start_errors("cluster: Ray on this machine does not answer", _again()):
                available = ray.cluster_resources().get("GPU", 0)
            _check_gpus(config, available)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.is_own:
            ray.shutdown()
            environment.replace("RAY_AUTH_MODE", self._auth_mode)
            self.is_own = False


def _again() -> str:
    logs = Path(environment.ray_temporary_folder()[1], "ray", "session_latest", "logs")
    return f"try again, with fewer other programs if the machine is busy ({str(logs)!r} has Ray's logs)"


def own_cluster(config: Config) -> dict[str, Any]:
    """Return the arguments of `ray.init` for a cluster of our own."""
    needed = total_resources(config.stages)
    return {
        "num_cpus": max(psutil.cpu_count() or 1, int(needed["CPU"]) + 1),  # bookkeeping: stages share cores
        "num_gpus": config.cluster.num_gpus,
        "resources": {name: number for name, number in needed.items() if name not in ("CPU", "GPU", "memory")},
        "include_dashboard": config.cluster.dashboard,
        "job_config": _job(_metadata(config)),
    }


def _job(metadata: dict[str, str]) -> JobConfig:
    """Return the configuration of a job whose workers import modules as any Python of their node does.

    Ray would search the working folder first and import a `numpy.py` or another version of this package from there. It
    does not for jobs that it takes for Ray Client's. A package that is not installed is imported from its folder.
    """
    if environment.in_ray_job():
        return JobConfig(metadata=metadata)  # the job's own working folder is part of it
    folders = [] if is_installed() else [str(PACKAGE.parent)]
    return JobConfig(metadata=metadata, _client_job=True, _py_driver_sys_path=folders)


def _metadata(config: Config) -> dict[str, str]:
    """Return what Ray's dashboard shows of the job."""
    stages = ", ".join(f"{name} x {stage.num_replicas}" for name, stage in config.stages.items())
    return {"disagg_ray": VERSION, "model": mask(config.model.path), "stages": stages}


def total_resources(stages: Mapping[str, StageConfig]) -> dict[str, float]:
    """Return the resources that all replicas need together, by Ray's names."""
    groups = [group for stage in stages.values() for group in stage.replica_groups.values()]
    counted = ((group.replicas * group.parallel.size, resources_of(group)) for group in groups)
    return {"CPU": 0, "GPU": 0} | add_up(counted)


def add_up(counted: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Return the sum of resources, each multiplied by its count."""
    total: dict[str, float] = {}
    for count, resources in counted:
        for name, number in resources.items():
            total[name] = total.get(name, 0) + count * number
    return {name: round(number, DIGITS) for name, number in total.items()}


def resources_of(settings: StageConfig) -> dict[str, float]:
    """Return the resources that one replica, or each of its ranks, needs, by Ray's names."""
    memory = {"memory": float(settings.memory)} if settings.memory is not None else {}
    return {"CPU": settings.num_cpus, "GPU": settings.num_gpus} | memory | settings.resources


def _check_gpus(config: Config, available: float) -> None:
    needed = total_resources(config.stages)["GPU"]
    if needed > available:
        by_stage = ", ".join(
            f"{name} {group.replicas} x {group.num_gpus * group.parallel.size:g}"
            for name, stage in config.stages.items()
            for group in stage.replica_groups.values()
        )
        raise ConfigError(
            f"stages.*.num_gpus: the stages need {needed:g} GPUs ({by_stage}) and this machine has {available:g}; "
            f"lower num_gpus, replicas or parallel, or join a cluster with cluster.address"
        )


def _make_token() -> None:
    """Write Ray's token so that only its owner can read it; Ray would let all users read it."""
    path = environment.ray_token_path()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            _write_token(path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise ConfigError(
            f"HOME: Ray's token {shown(str(path))} cannot be written: {error.strerror}; set HOME to a writable "
            f"folder, or RAY_AUTH_TOKEN_PATH to a file of your own"
        ) from error


def _write_token(path: Path) -> None:
    """Write a token that has its name once it is whole; where another process was quicker, its token stays."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

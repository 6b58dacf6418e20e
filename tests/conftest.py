"""Fixtures that several test files share."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import postgres as postgresql
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

if TYPE_CHECKING:
    from faulty import Faults
    from splits import Split

    from disagg_ray import Request
    from disagg_ray.config.schema import Config

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it, its children too


settings.register_profile("untimed", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine stops whatever runs, for as long as it likes

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "after which no test begins: the rest is skipped, and said so"
    parser.addoption("--minutes", type=float, default=math.inf, help=words)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"its {minutes:g} minutes are over: this machine is slow or busy")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that share a Ray, which `make test` and `make proof` run beside the others."""
    for item in items:
        if isinstance(item, pytest.Function) and "cluster" in item.fixturenames:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a shape's random checkpoint, made at its first use."""
    from disagg_ray.models.random import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda shape: make_checkpoint(shape, folder / shape)


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an RGB image of seeded noise: no two pixels alike, so that every resize and crop shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def image() -> Callable[..., Image.Image]:
    """Give `make_image`."""
    return make_image


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Frames are equal only for equal thread counts, and tensors this small lose by waiting for a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def splits(configure: Callable[..., Config]) -> Iterator[Callable[[str], Split]]:
    """Give what starts replicas of the module's configuration, once a cut, that hand tensors over with Mooncake."""
    from splits import recut, start_splits

    yield from start_splits(lambda cut: recut(configure(), cut))


@pytest.fixture(scope="module")
def ask(request: pytest.FixtureRequest, image: Callable[..., Image.Image]) -> Callable[..., Request]:
    """Give a request of one of the module's CASES, each of which has the sides of an image, with some changes."""
    from disagg_ray import Request

    plain, cases = request.module.PLAIN, request.module.CASES

    def make(case: str = "guided", **asked: Any) -> Request:
        fields = plain | cases[case] | {"format": "npy"}
        return Request(**(fields | {"image": image(*fields["image"], seed=len(case))} | asked))

    return make


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Give one local Ray for the whole session, with CPUs enough that no pipeline waits for another.

    Its disks and labels are there to be asked for; nothing is behind them.
    """
    import ray

    for last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=16,
                resources={"disk": 2},
                labels={"zone": "a"},
                include_dashboard=False,
                logging_level="ERROR",
            )
            break
        except Exception:  # Ray ends a start of which a process took over 15 s, as on a busy machine
            ray.shutdown()
            if last:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """Give a folder of faults, which every replica suffers that the module's tests start."""
    from faulty import faulty_replicas

    with faulty_replicas(tmp_path_factory.mktemp("faults")) as faults:
        yield faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give the mount point of a file system of its own."""
    if os.geteuid():
        pytest.skip("only root may mount")
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", mount], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.fixture(scope="module")
def postgres() -> Iterator[postgresql.Postgres]:
    """Give a PostgreSQL."""
    with postgresql.running() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.proof)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of a database."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").url)
    return f"sqlite:///{tmp_path}/jobs.db"

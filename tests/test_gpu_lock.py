"""Processes that share a GPU compute one after the other, fairly, and no death of one stops the others."""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch

from disagg_ray.errors import ConfigError
from disagg_ray.models.gpu_lock import GpuLock

GPU = "GPU-of-a-test"
CHILD = f"""
import sys, time
from disagg_ray.models.gpu_lock import GpuLock
turns = GpuLock({GPU!r})
for _ in range(int(sys.argv[1])):
    with turns.take():
        began = time.monotonic()
        print("began", flush=True)
        time.sleep(float(sys.argv[2]))
        print(began, time.monotonic(), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[int, float], subprocess.Popen[str]]]:
    """Start a process that takes so many turns of so many seconds, and wait for its first."""
    children: list[subprocess.Popen[str]] = []

    def start(count: int, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(count), str(seconds)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "began\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def spans(child: subprocess.Popen[str]) -> list[tuple[float, float]]:
    """End a process; return its turns, but for one that it is in."""
    child.kill()
    assert child.stdout is not None
    lines = [line.split() for line in child.stdout.read().split("\n")[:-1] if line != "began"]
    return [(float(began), float(ended)) for began, ended in lines]


def test_turns_of_two_processes_never_overlap_and_alternate(start: Callable[..., subprocess.Popen[str]]) -> None:
    child, turns, mine = start(10_000, 0.02), GpuLock(GPU), []
    for _ in range(10):
        with turns.take():
            began = time.monotonic()
            time.sleep(0.05)
            mine.append((began, time.monotonic()))
    theirs = spans(child)
    every = sorted(mine + theirs)
    assert all(before[1] <= after[0] for before, after in pairwise(every))
    between = [sum(mine[i][1] <= began < mine[i + 1][0] for began, _ in theirs) for i in range(9)]
    assert median(between) == 1  # the other one, always in want of a turn, had one and stood behind us again


def test_killed_holder_leaves_its_turn(start: Callable[..., subprocess.Popen[str]]) -> None:
    child, turns = start(1, 600), GpuLock(GPU)
    threading.Timer(0.2, child.kill).start()
    with turns.take():
        assert child.wait(60) == -9


def test_waiting_is_told_from_hanging(start: Callable[..., subprocess.Popen[str]]) -> None:
    child, turns, asked = start(1, 600), GpuLock(GPU), time.monotonic()
    had = threading.Event()

    def take() -> None:
        with turns.take():
            had.set()

    threading.Thread(target=take, daemon=True).start()
    while not turns.waiting:
        assert time.monotonic() < asked + 60
    child.kill()
    assert had.wait(60)
    assert not turns.waiting
    assert turns.began > asked


@pytest.mark.parametrize("names", [("forward",), ("encode", "decode")])
def test_each_call_of_a_model_is_a_turn(folder: Path, names: tuple[str, ...]) -> None:
    turns, done = GpuLock(GPU), []
    model: torch.nn.Module = torch.nn.Identity()
    for name in names:
        setattr(model, name, lambda x: x * 2 if turns.began else None)
    turns.apply(model, lambda: done.append(turns.began))
    assert [getattr(model, name)(3) for name in names] == [6] * len(names)
    assert len(done) == len(names)


def test_failing_call_gives_its_turn_back(folder: Path) -> None:
    turns, model = GpuLock(GPU), torch.nn.Linear(2, 2)
    turns.apply(model, lambda: None)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(torch.zeros(3))
    other = GpuLock(GPU)
    with other.take():
        assert other.began > turns.began


def test_folder_of_somebody_else_is_refused(folder: Path) -> None:
    GpuLock(GPU)
    (locks,) = folder.iterdir()
    locks.chmod(0o777)
    with pytest.raises(ConfigError, match="gpu_turns"):
        GpuLock(GPU)

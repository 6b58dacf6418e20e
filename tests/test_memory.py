"""A process that lives long gives back what it no longer uses."""

import subprocess
import sys

import pytest
import torch
from helpers import connect_stages

from disagg_ray.config.load import load_config
from disagg_ray.models.cut import Cut
from disagg_ray.request import Request, resolve

CODE = """
import threading, psutil
from disagg_ray.process import trim

def rss():
    return psutil.Process().memory_info().rss

def fill(kept):
    pieces = [bytearray(2000) for _ in range(50_000)]
    kept.append(pieces[-1])  # the last one keeps the heap below it from shrinking by itself

kept = []
threads = [threading.Thread(target=fill, args=(kept,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
before = rss()
trim()
print(before - rss())
"""


def test_what_threads_freed_goes_back_to_the_system() -> None:
    output = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert int(output) > 50 * 2**20


def test_after_running_out_of_gpu_memory_a_stage_begins_with_none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies free in pieces may be what a second attempt needs in one."""
    config = load_config("conf/tiny_t2v.yaml")
    stage = connect_stages(config)["encoder"]
    stage.load()
    request, _ = resolve(Request(prompt="a red circle"), config)
    expected = stage.compute(request, {}, None).tensors
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as full, pytest.raises(torch.OutOfMemoryError):
        full.setattr(Cut, "run", fail)
        stage.compute(request, {}, None)
    assert not emptied
    for count in (1, 2):
        made = stage.compute(request, {}, None).tensors
        assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
        assert len(emptied) == count

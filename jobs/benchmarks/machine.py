"""What benchmarks share: the machine they ran on, its clock, rows and figures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch


def machine() -> dict[str, Any]:
    """Return the hardware and versions of a measurement."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": names[0] if names else platform.processor(), "cores": psutil.cpu_count(), "gpus": gpus,
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def now(on_gpu: bool) -> float:
    """Return the seconds of a clock, once the GPU has done what it was given."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def note(log: Path, row: Mapping[str, Any]) -> None:
    """Print a row as JSON and append it to a file, should the run be cut off."""
    print(text := json.dumps(row), flush=True)
    with log.open("a") as file:
        file.write(text + "\n")


def subplots(*shape: int, **options: Any) -> tuple[Any, Any]:
    """Return a figure that needs no display, and its axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, **options)

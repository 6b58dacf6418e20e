"""What numbers were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch


def machine() -> dict[str, Any]:
    """Say what the numbers were measured on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": names[0] if names else platform.processor(), "cores": psutil.cpu_count(), "gpus": gpus,
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip

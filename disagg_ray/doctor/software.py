"""Checks installed software: Python, packages, torch against the GPU driver, Mooncake's wheel against torch."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from disagg_ray.doctor.check import Check, fail, fail_unless, ok, skipped, warn
from disagg_ray.replica.software import COMPARED, WHEELS, version_of
from disagg_ray.text import human_bytes


@dataclass(frozen=True)
class Gpu:
    name: str
    total_bytes: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this process, and what they are used through."""

    build: str | None
    """CUDA version of the torch build, as 12.8; None: a CPU build."""
    driver: str | None
    """Version of the loaded NVIDIA driver."""
    devices: tuple[Gpu, ...]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    detail = f"{platform.python_version()}; 3.11 to 3.13 are supported"
    return fail_unless((3, 11) <= version < (3, 14), "python", detail, "make an environment with python3.12")


def check_requirements(requirements: list[str] | None = None) -> Iterator[Check]:
    """Compare installed packages with this package's requirements."""
    if requirements is None:
        try:
            requirements = metadata.requires("disagg-ray") or []
        except metadata.PackageNotFoundError:
            yield skipped(
                "packages", "disagg-ray runs from its sources and is not installed: versions are not compared"
            )
            return
    listed = [Requirement(text) for text in requirements]
    wanted = [wish for wish in listed if wish.marker is None or wish.marker.evaluate({"extra": ""})]
    found = {wish.name: version_of(wish.name) for wish in wanted}
    wrong = [
        wish
        for wish in wanted
        if found[wish.name] == "none" or not wish.specifier.contains(found[wish.name], prereleases=True)
    ]
    for wish in wrong:
        yield fail("packages", f"{wish.name} {found[wish.name]} is not {wish.specifier}", f"pip install '{wish}'")
    if not wrong:
        yield ok("packages", ", ".join(f"{name} {version_of(name)}" for name in COMPARED))


def see_gpus() -> Gpus:
    available = torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Gpus(torch.version.cuda, _driver(), tuple(Gpu(gpu.name, gpu.total_memory) for gpu in found))


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        return None
    version = re.search(r"\d+\.\d+(\.\d+)?", path.read_text(encoding="utf-8"))
    return version.group() if version else "unknown"


def check_gpus(gpus: Gpus) -> Check:
    """Compare torch's build with the driver."""
    build = f"torch {torch.__version__}, CUDA {gpus.build}, driver {gpus.driver}"
    if gpus.devices:
        names = ", ".join(f"{gpu.name} {human_bytes(gpu.total_bytes)}" for gpu in gpus.devices)
        return ok("gpu", f"{build}: {names}")
    if gpus.build is None and gpus.driver is None:
        return ok("gpu", f"none; torch {torch.__version__} is built for CPUs")
    if gpus.build is None:
        return warn(
            "gpu", f"NVIDIA driver {gpus.driver} is loaded, but torch {torch.__version__} is built for CPUs",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128, then doctor again",
        )  # fmt: skip
    if gpus.driver is None:
        detail = f"torch is built for CUDA {gpus.build}, but no NVIDIA driver is loaded"
        return warn("gpu", detail, "check that `nvidia-smi` answers; start a container with --gpus all")
    return fail(
        "gpu", f"{build}: torch finds no GPU",
        f"check that CUDA_VISIBLE_DEVICES does not hide them and that the driver supports CUDA {gpus.build}: "
        f"python -c 'import torch; torch.cuda.init()'",
    )  # fmt: skip


def check_mooncake(wheels: Mapping[str, str], build: str | None) -> Check:
    """Compare Mooncake's wheel with the CUDA version torch is built for."""
    target = "CPUs" if build is None else f"CUDA {build.partition('.')[0]}"
    torch_is = f"torch is built for {target}"
    wanted = next((name for name, built_for in WHEELS.items() if built_for == target), None)
    if wanted is None:
        return fail("mooncake", f"{torch_is}, for which Mooncake has no wheel", "install a torch for CUDA 12 or 13")
    install = f"pip install '{wanted}<0.4'"
    if not wheels:
        return fail("mooncake", f"no wheel of Mooncake is installed, and {torch_is}", install)
    found = ", ".join(f"{name} {version}" for name, version in wheels.items())
    clean = f"pip uninstall -y {' '.join(wheels)} && {install}"
    if len(wheels) > 1:
        return fail("mooncake", f"{found}: they overwrite each other, since all import as mooncake", clean)
    (built_for,) = (WHEELS[name] for name in wheels)
    if built_for == target:
        return ok("mooncake", f"{found}, and {torch_is}")
    if built_for == "CPUs":
        return warn("mooncake", f"{found} has no CUDA and {torch_is}: GPU tensors go through host memory", clean)
    return fail("mooncake", f"{found} is built for {built_for} and {torch_is}", clean)

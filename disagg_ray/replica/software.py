"""Which code runs here, so that a driver and its replicas, or a client and its service, never differ unnoticed."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from disagg_ray.errors import StartError
from disagg_ray.version import VERSION

WHEELS = {
    "mooncake-transfer-engine-non-cuda": "CPUs",
    "mooncake-transfer-engine": "CUDA 12",
    "mooncake-transfer-engine-cuda13": "CUDA 13",
}
"""Mooncake's wheels, and what each is built for. All import as `mooncake`."""

COMPARED = ("ray", "torch", "diffusers", "transformers")
"""Packages that must be the same on every node, beside Python, Mooncake and this one."""

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Software:
    """What a process runs."""

    folder: str
    """Folder of this package."""
    digest: str
    """Of this package's sources."""
    versions: tuple[tuple[str, str], ...]
    """Of the libraries, by name, without what they are built for: nodes with and without GPUs work together."""


@cache
def software() -> Software:
    """Return what this process runs, as it was at the first call."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    mooncake = next(iter(installed_wheels().values()), "none")
    libraries = {name: version_of(name).partition("+")[0] for name in COMPARED} | {"mooncake": mooncake}
    return Software(str(PACKAGE), digest.hexdigest()[:12], tuple(libraries.items()))


def check_same(who: str, theirs: Software, whose: str = "the driver") -> None:
    """Check that another process runs what this one does.

    Raises:
        StartError: it does not; names both.
    """
    ours = software()
    remedy = "install the same version on every node, and keep copies of it out of the job's working folder"
    if theirs.digest != ours.digest:
        raise StartError(
            f"{who} runs other code than {whose}: disagg_ray {theirs.digest} in {theirs.folder}, "
            f"and {ours.digest} in {ours.folder}; {remedy}"
        )
    here = dict(ours.versions)
    others = [f"{name} {version} (here {here[name]})" for name, version in theirs.versions if version != here[name]]
    if others:
        raise StartError(f"{who} has other versions than {whose}: {', '.join(others)}; {remedy}")


def versions() -> dict[str, str]:
    """Return what must be equal on all nodes, by name."""
    packages = {name: version_of(name) for name in COMPARED}
    mooncake = ", ".join(f"{name} {version}" for name, version in installed_wheels().items())
    return {"python": platform.python_version(), "disagg_ray": VERSION, **packages, "mooncake": mooncake or "none"}


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def installed_wheels() -> dict[str, str]:
    """Return the version of each of Mooncake's wheels that is installed."""
    return {name: version for name in WHEELS if (version := version_of(name)) != "none"}


def is_installed() -> bool:
    """Return whether other processes of this Python find the package by themselves."""
    return version_of("disagg-ray") != "none"

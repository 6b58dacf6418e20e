"""What a machine lets a process do: libraries, RDMA, locked memory, shared memory, disk."""

from __future__ import annotations

import ctypes
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from disagg_ray.config.schema import TransportConfig
from disagg_ray.doctor.check import Check, fail, ok, skipped, warn
from disagg_ray.doctor.files import check_ffmpeg, check_temporary
from disagg_ray.doctor.security import check_dashboard, check_metrics_ports, check_ports, check_token, listening_ports
from disagg_ray.doctor.software import (
    Gpu,
    check_gpus,
    check_mooncake,
    check_python,
    check_requirements,
    see_gpus,
)
from disagg_ray.environment import cache_folder, ray_token_path
from disagg_ray.replica.software import installed_wheels, versions
from disagg_ray.text import human_bytes
from disagg_ray.transfer import routes

LEAST_SHM_BYTES = 10**9
LEAST_DISK_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Survey:
    """What one process finds on its machine."""

    checks: tuple[Check, ...]
    versions: dict[str, str]
    gpus: tuple[Gpu, ...]
    host_bytes: int
    """Of memory, in all."""


def survey(transport: TransportConfig, pool_bytes: int | None, *, sees_gpus: bool = True) -> Survey:
    """Check this machine.

    `pool_bytes` is the largest pool a stage registers, if that is known. `sees_gpus` is false in a Ray worker without
    a GPU, from which Ray hides them.
    """
    gpus = see_gpus()
    devices = routes.rdma_devices()
    ports = listening_ports()
    checks = (
        check_python(),
        *check_requirements(),
        *([check_gpus(gpus)] if sees_gpus else []),
        check_mooncake(installed_wheels(), gpus.build),
        check_libibverbs(),
        *check_rdma(transport),
        check_memlock(devices, pool_bytes),
        check_shm(),
        check_disk(),
        check_temporary(),
        check_ffmpeg(),
        check_token(ray_token_path()),
        check_ports(ports),
        check_metrics_ports(ports),
        check_dashboard(ports),
    )
    return Survey(checks, versions(), gpus.devices, psutil.virtual_memory().total)


def check_libibverbs(library: str = "libibverbs.so.1") -> Check:
    """Load the system library that Mooncake needs, RDMA card or not."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return fail("libibverbs", f"{error}: Mooncake cannot be loaded without it", "apt-get install libibverbs1")
    return ok("libibverbs", library)


def check_rdma(transport: TransportConfig) -> Iterator[Check]:
    """Look at each RDMA device's ports and GIDs, and for the devices that the configuration names."""
    devices = routes.rdma_devices()
    named = [name.strip() for name in transport.device_name.split(",") if name.strip()]
    for name in named:
        if name not in devices:
            yield fail(
                "rdma", f"transport.device_name: {name!r} is none of this machine's devices: {', '.join(devices)}",
                "set transport.device_name to one of them, or leave it empty",
            )  # fmt: skip
    if not devices and transport.protocol == "rdma":
        yield fail(
            "rdma",
            "transport.protocol is rdma and there is no device: no pool can be opened here",
            "set transport.protocol=auto",
        )
    elif not devices:
        yield skipped("rdma", "no device: tensors travel by nvlink_intra and tcp")
    for device in devices:
        yield _check_device(routes.INFINIBAND / device)


def _check_device(device: Path) -> Check:
    ports = sorted((device / "ports").glob("*"))
    active = [port for port in ports if "ACTIVE" in _read(port / "state")]
    gids = [gid.name for port in active for gid in (port / "gids").glob("*") if _read(gid).strip("0:\n")]
    if not active:
        return warn("rdma", f"{device.name}: no port is active", f"ip link show; ibv_devinfo -d {device.name}")
    if not gids:
        return warn("rdma", f"{device.name}: no GID on an active port", "give its network interface an IP address")
    return ok("rdma", f"{device.name}: {len(active)} of {len(ports)} ports active, {len(gids)} GIDs")


def _read(path: Path) -> str:
    """Return a small file of the kernel's; an unset GID cannot be read on some."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def check_memlock(devices: Sequence[str], pool_bytes: int | None) -> Check:
    """Compare the limit of locked memory with what RDMA must lock: the whole of a pool."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    if not devices:
        return ok("memlock", f"{human_bytes(limit)}; only RDMA locks memory, and there is no device")
    remedy = "ulimit -l unlimited before `ray start`; in a container, --ulimit memlock=-1; in systemd, LimitMEMLOCK="
    if pool_bytes is None:
        return warn("memlock", f"{human_bytes(limit)}: RDMA locks the whole of each pool", remedy)
    if limit < pool_bytes:
        return fail("memlock", f"{human_bytes(limit)}, and RDMA locks a pool of {human_bytes(pool_bytes)}", remedy)
    return ok("memlock", f"{human_bytes(limit)} for a pool of {human_bytes(pool_bytes)}")


def check_shm(path: str = "/dev/shm", least: int = LEAST_SHM_BYTES) -> Check:
    """Measure what Ray's object store lies in."""
    total = shutil.disk_usage(path).total
    if total >= least:
        return ok("shm", f"{path} holds {human_bytes(total)}")
    return warn(
        "shm", f"{path} holds {human_bytes(total)}, and Ray wants {human_bytes(least)}",
        "in a container, start it with --shm-size=2g; else mount -o remount,size=2G /dev/shm",
    )  # fmt: skip


def check_disk(folder: Path | None = None, least: int = LEAST_DISK_BYTES) -> Check:
    """Measure the room for checkpoints that are downloaded or made."""
    folder = folder or cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free >= least:
        return ok("disk", f"{human_bytes(free)} free for {folder}")
    return warn(
        "disk", f"{human_bytes(free)} free for {folder}",
        f"free {human_bytes(least)}, or set XDG_CACHE_HOME and HF_HOME to a larger disk",
    )  # fmt: skip

"""Checks one machine: system libraries, RDMA, locked and shared memory, disk, ffmpeg, temporary files."""

from __future__ import annotations

import ctypes
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor.check import Check, fail, fail_unless, ok, skipped, warn, warn_unless
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
from disagg_ray.errors import EncodeError, OutputError
from disagg_ray.media.places import check_output, try_folder
from disagg_ray.media.video import check_writer
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
    """Total host memory."""


def survey(transport: TransportConfig, pool_bytes: int | None, *, sees_gpus: bool = True) -> Survey:
    """Check this machine.

    Args:
        transport: how pools are to be reached.
        pool_bytes: the largest pool of a stage, if known.
        sees_gpus: False in a Ray worker without a GPU, from which Ray hides them.
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
    """Load the system library that Mooncake needs, with or without an RDMA card."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return fail("libibverbs", f"{error}: Mooncake cannot be loaded without it", "apt-get install libibverbs1")
    return ok("libibverbs", library)


def check_rdma(transport: TransportConfig) -> Iterator[Check]:
    """Check each RDMA device's ports and GIDs, and the devices that the configuration names."""
    devices = routes.rdma_devices()
    for name in filter(None, map(str.strip, transport.device_name.split(","))):
        if name not in devices:
            detail = f"transport.device_name: {name!r} is none of this machine's devices: {', '.join(devices)}"
            yield fail("rdma", detail, "set transport.device_name to one of them, or leave it empty")
    if not devices and transport.protocol == "rdma":
        detail = "transport.protocol is rdma, and this machine has no RDMA device: no pool can be opened"
        yield fail("rdma", detail, "set transport.protocol=auto")
    elif not devices:
        yield skipped("rdma", "no device: tensors use nvlink_intra and tcp")
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
    """Return a small file of the kernel's, or nothing: on some kernels an unset GID cannot be read."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def check_memlock(devices: Sequence[str], pool_bytes: int | None) -> Check:
    """Compare the limit of locked memory with the largest pool, which RDMA locks whole."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    if not devices:
        return ok("memlock", f"{human_bytes(limit)}; only RDMA locks memory, and there is no device")
    remedy = "ulimit -l unlimited before `ray start`; in a container, --ulimit memlock=-1; in systemd, LimitMEMLOCK="
    if pool_bytes is None:
        return warn("memlock", f"{human_bytes(limit)}: RDMA locks the whole of each pool", remedy)
    detail = f"{human_bytes(limit)}; RDMA locks pools of up to {human_bytes(pool_bytes)}"
    return fail_unless(limit >= pool_bytes, "memlock", detail, remedy)


def check_shm(path: str = "/dev/shm", least: int = LEAST_SHM_BYTES) -> Check:
    """Measure the shared memory of Ray's object store."""
    total = shutil.disk_usage(path).total
    return warn_unless(
        total >= least, "shm", f"{path} holds {human_bytes(total)}; Ray needs {human_bytes(least)}",
        "in a container, start it with --shm-size=2g; else mount -o remount,size=2G /dev/shm",
    )  # fmt: skip


def check_disk(folder: Path | None = None, least: int = LEAST_DISK_BYTES) -> Check:
    """Measure the disk space for checkpoints that are downloaded or made."""
    folder = folder or cache_folder()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    remedy = f"free {human_bytes(least)}, or set XDG_CACHE_HOME and HF_HOME to a larger disk"
    return warn_unless(free >= least, "disk", f"{human_bytes(free)} free for {folder}", remedy)


def check_ffmpeg() -> Check:
    """Encode one small frame."""
    try:
        check_writer("mp4")
    except EncodeError as error:
        return fail("ffmpeg", str(error), "pip install --force-reinstall imageio-ffmpeg; or set IMAGEIO_FFMPEG_EXE")
    return ok("ffmpeg", "encodes mp4")


def check_temporary() -> Check:
    """Write a small file to the temporary folder, for Ray's session and rescued videos."""
    try:
        folder = tempfile.gettempdir()
        try_folder(Path(folder), "temporary files")
    except (OSError, OutputError) as error:
        return fail("temporary", str(error), "free some of its space, or set TMPDIR to another folder")
    return ok("temporary", f"{folder} can be written")


def check_place(output: str) -> Check:
    """Write a small file where a video is to go."""
    try:
        check_output(output, overwrite=True)
    except OutputError as error:
        return fail("output", str(error), "give another --output")
    return ok("output", f"{output} can be written")

"""What a transfer takes by route and size, each beside a bare Mooncake read of the same bytes in the same run."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray
import torch
from benchmarks.machine import subplots

from disagg_ray.config.transport import TransportConfig
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import HEADER_BYTES, slot_bytes

HOST = "127.0.0.1"
SIZES = tuple(1024 * kib for kib in (4, 64, 1024, 16 * 1024, 64 * 1024, 256 * 1024))
LATENT_BYTES = 10_000_000
WARM_UPS = 3
SECONDS_EACH = 0.2
"""Of repeating one action; at least five times, at most fifty."""

PUBLISHED = AttemptKey("published", 0)
_attempts = itertools.count()


@dataclass(frozen=True)
class Way:
    """A route from one kind of memory to another."""

    route: str
    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.route} {self.source} to {self.target}"


@dataclass(frozen=True)
class Row:
    """Median seconds to move `nbytes`."""

    way: str
    nbytes: int
    bare_s: float
    """Engine.read between the memory that is registered for the route."""
    unchecked_s: float
    """Reserve, pull and release, without checksums."""
    checked_s: float
    copy_s: float | None
    """A device-to-device copy, for nvlink_intra."""
    bare_gb_per_s: float
    unchecked_gb_per_s: float
    checked_gb_per_s: float
    unchecked_share: float
    """Of the bare read's speed."""
    checked_share: float


def ways() -> list[Way]:
    """Return what can be measured here."""
    found = [Way("tcp", "cpu", "cpu")]
    if torch.cuda.is_available():
        source, target = f"cuda:{torch.cuda.device_count() - 1}", "cuda:0"  # one GPU and the next, or the same
        found += [Way("tcp", source, "cpu"), Way("tcp", source, target), Way("nvlink_intra", source, target)]
    return found


def measure(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    rows = [row for way in ways() for row in _measure_way(way, sizes)]
    return {"pulls": [asdict(row) for row in rows], "latent": latent()}


def _measure_way(way: Way, sizes: tuple[int, ...]) -> Iterator[Row]:
    pools = {
        verify: Pool("bench", slot_bytes(max(sizes)), HOST, TransportConfig(way.route, verify=verify), way.target)
        for verify in (False, True)
    }
    try:
        with _published(way, sizes) as handoff:
            for nbytes in sizes:
                actions = _actions(way, pools, handoff, nbytes)
                yield _row(way.name, nbytes, {name: _median_s(action) for name, action in actions.items()})
    finally:
        for pool in pools.values():
            pool.close()


def _actions(way: Way, pools: Mapping[bool, Pool], handoff: Handoff, nbytes: int) -> dict[str, Callable[[], object]]:
    (meta,) = (meta for meta in handoff.tensors if meta.spec.nbytes == nbytes)
    (session,) = handoff.sessions
    endpoint = pools[False].endpoints[way.route]
    local, remote = endpoint.memory.data_ptr(), meta.address + session.shift
    actions: dict[str, Callable[[], object]] = {
        "bare": lambda: endpoint.engine.read(session, [local], [remote], [HEADER_BYTES + nbytes]),
        "unchecked": lambda: _pull(pools[False], handoff, meta.name),
        "checked": lambda: _pull(pools[True], handoff, meta.name),
    }
    if way.route == "nvlink_intra":
        near, far = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for device in (way.target, way.source))

        def copy() -> None:
            near.copy_(far, non_blocking=True)
            for device in {way.target, way.source}:
                torch.cuda.synchronize(device)

        actions["copy"] = copy
    return actions


def _pull(pool: Pool, handoff: Handoff, name: str) -> None:
    key = AttemptKey("pulled", next(_attempts))
    (nbytes,) = (meta.spec.nbytes for meta in handoff.tensors if meta.name == name)
    pool.reserve(key, {name: nbytes})
    pool.pull(key, handoff, [name])
    pool.release(key)


def _median_s(action: Callable[[], object]) -> float:
    def once() -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    warm = min(once() for _ in range(WARM_UPS))
    return statistics.median(once() for _ in range(max(5, min(50, int(SECONDS_EACH / warm)))))


def _row(way: str, nbytes: int, seconds: Mapping[str, float]) -> Row:
    bare, unchecked, checked = (seconds[name] for name in ("bare", "unchecked", "checked"))
    speeds = (nbytes / s / 1e9 for s in (bare, unchecked, checked))
    return Row(way, nbytes, bare, unchecked, checked, seconds.get("copy"), *speeds, bare / unchecked, bare / checked)


@contextmanager
def _published(way: Way, sizes: tuple[int, ...]) -> Iterator[Handoff]:
    """Publish random bytes of every size from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, way, sizes), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        child.kill()
        child.join()


def _serve(connection: Connection, way: Way, sizes: tuple[int, ...]) -> None:
    if way.source != "cpu":
        torch.cuda.set_device(way.source)  # as in a replica, whose only GPU is the current one
    pool = Pool("serve", sum(map(slot_bytes, sizes)), HOST, TransportConfig(way.route), way.source)
    pool.reserve(PUBLISHED, {str(size): size for size in sizes})
    tensors = {str(size): torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes}
    connection.send(pool.publish(PUBLISHED, tensors))
    connection.poll(None)  # until the other end closes or kills this process


class Holder:
    """An actor with a pool and a latent on its device."""

    def __init__(self, device: str, verify: bool) -> None:
        self._pool = Pool("holder", 4 * slot_bytes(LATENT_BYTES), HOST, TransportConfig(verify=verify), device)
        self._latent = torch.randn(LATENT_BYTES // 4).to(device)

    def nothing(self) -> None:
        """Take part in a call that does no work."""

    def publish(self, key: AttemptKey) -> tuple[Handoff, float]:
        self._pool.reserve(key, {"latents": self._latent.nbytes})
        started = time.perf_counter()
        handoff = self._pool.publish(key, {"latents": self._latent})
        return handoff, time.perf_counter() - started

    def pull(self, key: AttemptKey, handoff: Handoff) -> tuple[str, float]:
        self._pool.reserve(key, {"latents": handoff.nbytes})
        started = time.perf_counter()
        self._pool.pull(key, handoff)
        return self._pool.route(handoff), time.perf_counter() - started

    def release(self, key: AttemptKey) -> None:
        self._pool.release(key)


def latent(repeats: int = 50) -> dict[str, Any]:
    """Time publish, handoff and pull of a latent between two actors, and what of it is Ray's."""
    ray.init(address="local", include_dashboard=False, logging_level="ERROR")
    try:
        rows = {verify: _latent(verify, repeats) for verify in (False, True)}
    finally:
        ray.shutdown()
    checked, unchecked = rows[True], rows[False]
    added_s = checked["pool_s"] - unchecked["pool_s"]
    return checked | {
        "bytes": LATENT_BYTES,
        "unchecked_total_s": unchecked["total_s"],
        "unchecked_pool_s": unchecked["pool_s"],
        "checksum_share_of_pool": added_s / checked["pool_s"],
        "checksum_share_of_total": added_s / checked["total_s"],
    }


def _latent(verify: bool, repeats: int) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    device, share = ("cuda", min(1, gpus / 2)) if gpus else ("cpu", 0)
    actor: Any = ray.remote(num_gpus=share, num_cpus=0)(Holder)
    holders = [actor.remote(device, verify) for _ in range(2)]
    times = [_hand_over(*holders, AttemptKey("latent", number)) for number in range(WARM_UPS + repeats)][WARM_UPS:]
    for holder in holders:
        ray.kill(holder)
    medians = {name: statistics.median(t[name] for t in times) for name in ("total_s", "publish_s", "pull_s", "ray_s")}
    pool_s = statistics.median(t["publish_s"] + t["pull_s"] for t in times)
    return {"device": device, "route": times[-1]["route"], "pool_s": pool_s} | medians


def _hand_over(producer: Any, consumer: Any, key: AttemptKey) -> dict[str, Any]:
    started = time.perf_counter()
    handoff, publish_s = ray.get(producer.publish.remote(key))
    route, pull_s = ray.get(consumer.pull.remote(key, handoff))
    done = time.perf_counter()
    ray.get([holder.release.remote(key) for holder in (producer, consumer)])
    idle = time.perf_counter()
    ray.get(producer.nothing.remote())
    ray.get(consumer.nothing.remote())
    ray_s = time.perf_counter() - idle
    return {"total_s": done - started, "publish_s": publish_s, "pull_s": pull_s, "ray_s": ray_s, "route": route}


def report(result: Mapping[str, Any], folder: Path) -> None:
    """Plot speed over size, and print a table."""
    rows = [Row(**row) for row in result["pulls"]]
    _plot(rows, folder / "bench_transfer.png")
    print(f"{'route':<32}{'bytes':>11}{'bare ms':>10}{'pull ms':>10}{'checked':>10}{'GB/s':>8}{'of bare':>9}"
          f"{'checked':>9}{'copy ms':>9}")  # fmt: skip
    for row in rows:
        copy = "-" if row.copy_s is None else f"{row.copy_s * 1e3:.3f}"
        print(f"{row.way:<32}{row.nbytes:>11}{row.bare_s * 1e3:>10.3f}{row.unchecked_s * 1e3:>10.3f}"
              f"{row.checked_s * 1e3:>10.3f}{row.unchecked_gb_per_s:>8.2f}{row.unchecked_share:>9.2f}"
              f"{row.checked_share:>9.2f}{copy:>9}")  # fmt: skip
    print("latent between two actors:", json.dumps(result["latent"]))


def _plot(rows: list[Row], path: Path) -> None:
    figure, axes = subplots(figsize=(8, 5))
    for colour, way in enumerate(dict.fromkeys(row.way for row in rows)):
        mine = [row for row in rows if row.way == way]
        sizes = [row.nbytes for row in mine]
        axes.plot(sizes, [row.checked_gb_per_s for row in mine], f"C{colour}o-", label=way)
        axes.plot(sizes, [row.unchecked_gb_per_s for row in mine], f"C{colour}:")
        axes.plot(sizes, [row.bare_gb_per_s for row in mine], f"C{colour}--")
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="GB/s", title="pull (dotted: unchecked, dashed: bare)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")

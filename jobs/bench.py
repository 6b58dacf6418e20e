"""Measurements, each beside its baseline in the same run; prints a table and writes JSON.

python jobs/bench.py overhead            # the tiny model split over actors against one process, on this machine
python jobs/bench.py pull                # a pool's pull against a bare Mooncake read of the same bytes
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from disagg_ray import LocalPipeline, Pipeline, Request
from disagg_ray.config import TransportConfig
from disagg_ray.handoff import AttemptKey, Session
from disagg_ray.transfer.engine import Engine
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import slot_bytes

MIB = 2**20
HOST = "127.0.0.1"


def overhead(repeats: int) -> dict[str, Any]:
    """Time one request at a time through three actors and through one process, in turn."""
    config = "conf/tiny_t2v.yaml"
    request = Request(prompt="a red circle moving left", seed=7)
    local = LocalPipeline.from_config(config)
    with Pipeline.from_config(config) as split:
        for pipeline in (local, split):
            pipeline.generate(request)
        pairs = [(local.generate(request), split.generate(request)) for _ in range(repeats)]
    stages = [result.stages for _, result in pairs]
    share = {
        name: statistics.median(sum(getattr(stage, name) for stage in timings) for timings in stages)
        for name in ("queue_s", "pull_s", "compute_s", "publish_s")
    }
    return {
        "repeats": repeats,
        "local_s": statistics.median(result.seconds for result, _ in pairs),
        "split_s": statistics.median(result.seconds for _, result in pairs),
        "added_s": statistics.median(b.seconds - a.seconds for a, b in pairs),
        "local_compute_s": statistics.median(sum(s.compute_s for s in result.stages) for result, _ in pairs),
        **{f"split_{name}": seconds for name, seconds in share.items()},
    }


def pull(repeats: int) -> list[dict[str, Any]]:
    """Time a pool's pull from another process, checked and unchecked, and a bare read of the same bytes, in turn."""
    rows = []
    for nbytes in (4096, MIB, 16 * MIB, 64 * MIB):
        child = subprocess.Popen(
            [sys.executable, __file__, "serve", str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        try:
            rows.append(_pull_row(nbytes, json.loads(child.stdout.readline()), repeats))
        finally:
            child.kill()
    return rows


def _pull_row(nbytes: int, served: dict[str, Any], repeats: int) -> dict[str, Any]:
    from disagg_ray.handoff import Handoff, TensorMeta, TensorSpec

    meta = TensorMeta(
        "t", TensorSpec((nbytes,), "uint8", nbytes), served["address"], bytes.fromhex(served["nonce"]), served["sum"]
    )
    session = Session("tcp", served["session"])
    handoff = Handoff(AttemptKey("bench", 0), "bench", (session,), served["checksum"], (meta,))
    buffer = torch.zeros(slot_bytes(nbytes), dtype=torch.uint8)
    engine = Engine(HOST, TransportConfig())
    engine.register(buffer.data_ptr(), len(buffer))
    pools = {
        verify: Pool("bench", slot_bytes(nbytes), HOST, TransportConfig(verify=verify)) for verify in (True, False)
    }
    keys = iter(range(10**9))

    def read() -> None:
        engine.read(session, [buffer.data_ptr()], [served["address"]], [slot_bytes(nbytes)])

    def pull_into(pool: Pool) -> Callable[[], None]:
        def once() -> None:
            key = AttemptKey("bench", next(keys))
            pool.reserve(key, {"t": nbytes})
            pool.pull(key, handoff)
            pool.release(key)

        return once

    actions = {"bare": read, "checked": pull_into(pools[True]), "unchecked": pull_into(pools[False])}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 3):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds[3:]) for name, seconds in times.items()}
    row: dict[str, Any] = {"bytes": nbytes} | {f"{name}_s": seconds for name, seconds in medians.items()}
    row |= {f"{name}_share_of_bare": medians["bare"] / medians[name] for name in ("checked", "unchecked")}
    row["bare_gb_per_s"] = nbytes / medians["bare"] / 1e9
    return row


def serve(nbytes: int) -> None:
    """Publish random bytes and wait to be killed: the other end of `pull`."""
    pool = Pool("serve", slot_bytes(nbytes), HOST, TransportConfig())
    key = AttemptKey("bench", 0)
    pool.reserve(key, {"t": nbytes})
    handoff = pool.publish(key, {"t": torch.randint(0, 256, (nbytes,), dtype=torch.uint8)})
    (meta,) = handoff.tensors
    said = {"session": pool.sessions[0].name, "address": meta.address, "nonce": meta.nonce.hex(), "sum": meta.checksum}
    print(json.dumps(said | {"checksum": handoff.checksum}), flush=True)
    sys.stdin.read()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "pull", "serve"))
    parser.add_argument("nbytes", type=int, nargs="?", default=0, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    if options.what == "serve":
        return serve(options.nbytes)
    torch.set_num_threads(1)
    result = {"machine": machine(), options.what: {"overhead": overhead, "pull": pull}[options.what](options.repeats)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"bench_{options.what}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return None


if __name__ == "__main__":
    main()

"""Replicas that die, wait or stall at a named point when a file says so: real crashes of real parts, at exact moments.

python tests/faulty.py FOLDER LATENTS    # a driver to be killed: one request, its latents kept in a file
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import torch

from disagg_ray import Pipeline, Request
from disagg_ray.driver import placement
from disagg_ray.errors import DisaggError
from disagg_ray.graph import Graph
from disagg_ray.replica import actor
from disagg_ray.replica.messages import ReplicaInfo, Task
from disagg_ray.replica.served import ServedReplica
from disagg_ray.replica.stage import Outputs
from disagg_ray.request import ResolvedRequest
from disagg_ray.transfer.handoff import AttemptKey, Handoff

PATIENCE_S = 120.0
RESUMED = Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=6, id="resumed")


class Faults:
    """A folder of files named STAGE.POINT or STAGE.POINT.REQUEST; each holds what is to happen there.

    `die`, `stall`, `break`, `poison` and `assert`: once, to whichever replica comes first. `break`: from then on that
    replica fails whenever it computes. `poison`: as after a CUDA error; `assert`: after a real one. `die always`,
    `fail always`: to every one. `wait`: until the file is gone. The file `computed` gets a line whenever a stage begins
    to compute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_broken = False
        """In a replica's process."""

    def set(self, where: str, what: str) -> None:
        (self.folder / f"at.{where}").unlink(missing_ok=True)
        path = self.folder / f"{where}.new"
        path.write_text(what)
        path.rename(self.folder / where)

    def clear(self, where: str) -> None:
        (self.folder / where).unlink(missing_ok=True)

    def trip(self, stage: str, point: str, request_id: str) -> None:
        """Suffer here what the files say."""
        if self.is_broken and point == "compute":
            raise RuntimeError("this replica is broken")
        for name in (f"{stage}.{point}", f"{stage}.{point}.{request_id}"):
            path = self.folder / name
            try:
                what = path.read_text()
            except FileNotFoundError:  # or another replica took it just now
                continue
            if what:
                self._suffer(path, what)

    def _suffer(self, path: Path, what: str) -> None:
        path.with_name(f"at.{path.name}").touch()
        deadline = time.monotonic() + PATIENCE_S
        while what == "wait" and path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if what in ("die", "stall", "break", "poison", "assert"):
            try:
                path.unlink()
            except FileNotFoundError:
                return  # another replica took it
        if what.startswith("die"):
            os._exit(1)
        if what == "stall":
            time.sleep(PATIENCE_S)
        if what == "break":
            self.is_broken = True
            raise RuntimeError("this replica breaks")
        if what == "poison":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        if what == "assert":  # on a GPU: every CUDA call of this process fails from now on
            torch.zeros(2, device="cuda")[torch.tensor([7], device="cuda")].cpu()
        if what == "fail always":
            raise RuntimeError("this request fails")

    def await_arrival(self, where: str) -> None:
        """Return once a replica waits there."""
        mark, deadline = self.folder / f"at.{where}", time.monotonic() + PATIENCE_S
        while not mark.exists():
            assert time.monotonic() < deadline, f"no replica came to {where}"
            time.sleep(0.01)
        mark.unlink()

    def note(self, stage: str, request_id: str) -> None:
        with (self.folder / "computed").open("a") as file:
            file.write(f"{time.time()} {stage} {request_id}\n")

    def computed(self) -> list[tuple[float, str, str]]:
        """Return when which stage began to compute for which request."""
        lines = (self.folder / "computed").read_text().split("\n")[:-1]
        return [(float(began), stage, request_id) for began, stage, request_id in map(str.split, lines)]

    def times_computed(self, request_id: str) -> Counter[str]:
        return Counter(stage for _, stage, request in self.computed() if request == request_id)


class FaultyReplica(ServedReplica):
    """A replica with weak points: load, prefetch, pull (room is reserved), compute, step, publish (it is copied),
    encode, release."""

    faults: Faults
    is_weak = False
    """It is loaded, and has its weak points."""

    def load(self, graph: Graph, *args: Any) -> ReplicaInfo:
        self.faults.trip(self.stage.name, "load", "")
        info = super().load(graph, *args)
        if isinstance(info, DisaggError) or self.is_weak:  # it is asked again where its answer was lost
            return info
        self.is_weak = True
        name, compute, pull, publish = self.stage.name, self.stage.compute, self.pool.pull, self.pool.publish

        def faulty_compute(
            request: ResolvedRequest, tensors: Mapping[str, torch.Tensor], on_step: Callable[[int, int], None]
        ) -> Outputs:
            def faulty_step(step: int, steps: int) -> None:
                on_step(step, steps)
                self.faults.trip(name, "step", request.id)

            self.faults.note(name, request.id)
            self.faults.trip(name, "compute", request.id)
            return compute(request, tensors, faulty_step)

        def faulty_pull(key: AttemptKey, *args: Any) -> dict[str, torch.Tensor]:
            self.faults.trip(name, "pull", key.request_id.rpartition(".")[0])
            return pull(key, *args)

        def faulty_publish(key: AttemptKey, *args: Any) -> Handoff:
            handoff = publish(key, *args)
            self.faults.trip(name, "publish", key.request_id.rpartition(".")[0])
            return handoff

        def faulty_encode(*args: Any, **options: Any) -> bytes:
            self.faults.trip(name, "encode", self._encoding)
            return encode(*args, **options)

        encode, actor.encode = actor.encode, faulty_encode
        self.stage.compute, self.pool.pull, self.pool.publish = faulty_compute, faulty_pull, faulty_publish  # type: ignore[method-assign, assignment]
        return info

    def encode(self, key: AttemptKey, *args: Any) -> Any:
        self._encoding = key.request_id.rpartition(".")[0]
        return super().encode(key, *args)

    def prefetch(self, task: Task) -> Any:
        self.faults.trip(self.stage.name, "prefetch", task.request.id)
        return super().prefetch(task)

    def release(self, key: AttemptKey) -> None:
        self.faults.trip(self.stage.name, "release", key.request_id.rpartition(".")[0])
        super().release(key)


@contextmanager
def faulty_replicas(folder: Path) -> Iterator[Faults]:
    """Have every pipeline launch replicas that suffer what stands in a folder."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
    faults = Faults(folder)
    with patch.object(placement, "ServedReplica", type("Faulty", (FaultyReplica,), {"faults": faults})):
        yield faults


def main() -> None:
    folder, latents = map(Path, sys.argv[1:])
    with faulty_replicas(folder), Pipeline.from_config("conf/tiny_t2v.yaml") as pipeline:
        print(*[replica.pid for replica in pipeline.replicas], flush=True)
        pipeline.submit(RESUMED, latents_file=latents).result(PATIENCE_S)


if __name__ == "__main__":
    main()

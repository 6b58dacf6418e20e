"""A thousand requests while everything that can be struck is struck: `make storm`, by hand; needs root and Linux.

python tests/storm.py batch FOLDER [REQUESTS] [SEED]      # an own pipeline; the batch is run again until all is done
python tests/storm.py service FOLDER [REQUESTS] [SEED]    # three clients of a service, which break off and come back

Ends with 0 if no request was lost, none done twice, and every file equals an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import ray
from faulty import Faults, faulty_replicas
from PIL import Image

from disagg_ray import Cancelled, Connection, DisaggError, LocalPipeline, Request, cli
from disagg_ray.batch.manifest import read_manifest
from disagg_ray.service import lifecycle
from disagg_ray.service.supervisor import Supervisor

I2V = "conf/tiny_i2v.yaml"
OVERRIDES = (
    "stages.transformer.replicas=2", "stages.decoder.replicas=2", "failures.stall_s=10", "failures.answer_s=8",
    "failures.max_attempts=5", "failures.shutdown_grace_s=1", "transport.timeout_s=5", "service.client_timeout_s=20",
)  # fmt: skip
NUM_PICTURES, NUM_SEEDS = 4, 3
GROUP = 25
"""Requests that share an image file, whose content may change until the first of them is done."""
EVERY_S = (3.0, 12.0)
"""Between two strikes."""
RUN_S = 60.0
"""Between two strikes that end a run, which has to start again."""
SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}


def picture(kind: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(kind).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def request_of(number: int, image: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": "a blue triangle", "seed": number % NUM_SEEDS, "image": image, **SIZE}


def digest(data: bytes | None) -> str:
    return hashlib.sha256(data or b"").hexdigest()


def undisturbed() -> dict[tuple[int, int], str]:
    """Return the digest of each video that may come, by picture and seed."""
    local = LocalPipeline.from_config(I2V)
    kinds = [(kind, seed) for kind in range(NUM_PICTURES) for seed in range(NUM_SEEDS)]
    return {
        (kind, seed): digest(local.generate(Request(**request_of(seed, picture(kind)))).data) for kind, seed in kinds
    }


class Groups:
    """Which picture each group of requests has now."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self.kinds = [number % NUM_PICTURES for number in range(-(-number // GROUP))]
        self._random = rng
        self.num_changed = 0

    def of(self, number: int) -> int:
        return self.kinds[number // GROUP]

    def change(self, untouched: set[int]) -> None:
        """Give some groups another picture."""
        for group in self._random.sample(sorted(untouched), min(3, len(untouched))):
            self.kinds[group] = (self.kinds[group] + 1) % NUM_PICTURES
            self.num_changed += 1


class Storm:
    """Strikes, one after the other, from a thread of its own."""

    def __init__(
        self,
        rng: random.Random,
        faults: Faults,
        more: dict[str, Callable[[], None]],
        ending: dict[str, Callable[[], None]] | None = None,
    ) -> None:
        self._random, self._faults, self._ending = rng, faults, ending or {}
        self.counts: Counter[str] = Counter()
        self._over = threading.Event()
        self._strikes: dict[str, Callable[[], None]] = {
            "kill": partial(self._signal, signal.SIGKILL), "stop": partial(self._signal, signal.SIGSTOP),
            "break": partial(self._set, "transformer.compute", "break"),
            "poison": partial(self._set, "transformer.compute", "poison"),
            "hung encode": partial(self._set, "decoder.encode", "stall"),
            "hung pull": partial(self._set, "decoder.pull", "stall"),
            "GCS down": self._stop_gcs, **more,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Storm:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        ended = time.monotonic()
        while not self._over.wait(self._random.uniform(*EVERY_S)):
            choice = self._strikes
            if self._ending and time.monotonic() > ended + RUN_S:
                choice, ended = self._ending, time.monotonic()
            name = self._random.choice(list(choice))
            print("strike:", name, flush=True)
            self.counts[name] += 1
            choice[name]()

    def _set(self, where: str, what: str) -> None:
        self._faults.set(where, what)

    def _signal(self, how: signal.Signals) -> None:
        found = [p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith(STAGES)]
        if found:
            self._random.choice(found).send_signal(how)

    def _stop_gcs(self) -> None:
        (gcs,) = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "gcs_server"]
        gcs.suspend()
        time.sleep(5)
        gcs.resume()


STAGES = ("ray::Encoder", "ray::Transformer", "ray::Decoder", "ray::encoder", "ray::transformer", "ray::decoder")


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """Mount a small file system at a folder; give what fills it for a while."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder], check=True)

    def fill() -> None:
        filler = folder / ".filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                time.sleep(4)
        filler.unlink()

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def storm_batch(folder: Path, number: int, rng: random.Random, expected: dict[tuple[int, int], str]) -> None:
    groups, requests, out = Groups(number, rng), folder / "requests.jsonl", folder / "out"
    files = [folder / f"group{index}.png" for index in range(len(groups.kinds))]
    lines = [request_of(n, str(files[n // GROUP])) for n in range(number)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--config", I2V, "--requests", str(requests), "--output-dir", str(out), "--retry-failed",
               "--quiet", *OVERRIDES]  # fmt: skip
    with ExitStack() as stack:
        fill = stack.enter_context(small_disk(out))
        faults = stack.enter_context(faulty_replicas(folder))
        ending = {"full disk": fill, "SIGTERM": partial(os.kill, os.getpid(), signal.SIGTERM)}
        storm = stack.enter_context(Storm(rng, faults, {}, ending))
        for runs in range(1, 200):
            for path, kind in zip(files, groups.kinds, strict=True):
                picture(kind).save(path)
            try:
                status = cli.main(command)
            except SystemExit:
                status = 143
            done = {int(record.id[1:]) for record in read_manifest(out) if record.status == "done"}
            print(f"run {runs}: status {status}, {len(done)} of {number} done", flush=True)
            if status == 0:
                break
            time.sleep(1)  # a disk that is full refuses at once
            groups.change({g for g in range(len(files)) if not done & set(range(g * GROUP, (g + 1) * GROUP))})
        records = [record for record in read_manifest(out) if record.status == "done"]
        twice = [name for name, count in Counter(record.id for record in records).items() if count > 1]
        made = {f"r{n}": out / f"r{n}.mp4" for n in range(number)}
        lost = [name for name, path in made.items() if not path.exists()]
        wrong = [
            n for n in range(number)
            if digest(made[f"r{n}"].read_bytes()) != expected[groups.of(n), n % NUM_SEEDS]
        ]  # fmt: skip
    tell(storm, groups, f"{runs} runs", lost, twice, wrong)


class FaultySupervisor(Supervisor):
    """Launches replicas with weak points."""

    folder: Path
    tests = str(Path(__file__).parent)

    def __init__(self, *args: Any) -> None:
        sys.path.insert(0, self.tests)  # Ray's workers do not find this folder
        from faulty import faulty_replicas

        ExitStack().enter_context(faulty_replicas(self.folder))
        Supervisor.__init__(self, *args)


def storm_service(folder: Path, number: int, rng: random.Random, expected: dict[tuple[int, int], str]) -> None:
    groups = Groups(number, rng)
    results: list[tuple[int, int, str]] = []
    """Number, picture and digest."""
    with ExitStack() as stack:
        faults = stack.enter_context(faulty_replicas(folder))
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        supervisor = type("Storming", (FaultySupervisor,), {"folder": folder})
        stack.enter_context(patch.object(lifecycle, "Supervisor", supervisor))
        assert cli.main(["up", "storm", "--config", I2V, *OVERRIDES]) == 0
        stack.callback(cli.main, ["down", "storm"])
        storm = stack.enter_context(Storm(rng, faults, {"supervisor": kill_supervisor}))
        with ThreadPoolExecutor(3) as clients:
            shares = [list(range(k * GROUP, min(number, (k + 1) * GROUP))) for k in range(len(groups.kinds))]
            for done in clients.map(partial(serve, groups=groups, rng=rng), shares):
                results += done
                print(f"{len(results)} of {number} done", flush=True)
    counts = Counter(n for n, _, _ in results)
    lost, twice = [n for n in range(number) if not counts[n]], [n for n, count in counts.items() if count > 1]
    wrong = [n for n, kind, data in results if data != expected[kind, n % NUM_SEEDS]]
    tell(storm, groups, "", lost, twice, wrong)


def kill_supervisor() -> None:
    for process in psutil.process_iter(["name"]):
        if "Storming" in (process.info["name"] or ""):
            process.kill()


def serve(share: list[int], groups: Groups, rng: random.Random) -> list[tuple[int, int, str]]:
    """Have a group's requests generated; break off once, change its picture, and ask again under the same ids."""
    breaks_off, left, done = rng.random() < 0.5, set(share), []
    deadline = time.monotonic() + 1800
    while left:
        assert time.monotonic() < deadline, f"{sorted(left)} never came"
        kind = groups.of(share[0])
        try:
            with Connection("storm", run_id=f"group {share[0]}") as connection:
                asked = [Request(**request_of(n, picture(kind))) for n in sorted(left)]
                if breaks_off and not done:
                    breaks_off = False
                    for request in asked[:6]:
                        connection.submit(request)
                    time.sleep(rng.uniform(0, 3))
                    groups.change({share[0] // GROUP})
                    continue
                for result in connection.generate_all(asked):
                    done.append((int(result.request.id[1:]), kind, digest(result.data)))
                    left.discard(int(result.request.id[1:]))
        except (DisaggError, Cancelled) as error:
            print(f"client {share[0]}: {type(error).__name__}: {error}"[:300], flush=True)
            time.sleep(1)
    return done


def tell(storm: Storm, groups: Groups, runs: str, lost: list[Any], twice: list[Any], wrong: list[Any]) -> None:
    print(f"strikes: {dict(storm.counts)}, pictures changed: {groups.num_changed} {runs}")
    print(f"lost {len(lost)}, twice {len(twice)}, wrong {len(wrong)}", lost[:5], twice[:5], wrong[:5])
    if lost or twice or wrong:
        sys.exit(1)


def main() -> None:
    which, folder = sys.argv[1], Path(sys.argv[2])
    number, seed = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((3, 1000), (4, 0)))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began, expected = time.monotonic(), undisturbed()
    assert len(set(expected.values())) == len(expected), "two videos are alike"
    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level="ERROR")
    {"batch": storm_batch, "service": storm_service}[which](folder, number, random.Random(seed), expected)
    print(f"{number} requests in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

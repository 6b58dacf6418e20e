"""A cluster that grows: Ray's autoscaler, its provider of fake nodes, and a service that needs more of them.

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32)
python tests/growing.py FOLDER    # prints what is waited for; ends with 0 if nodes came, were used, and went again
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import psutil
import ray
from helpers import free_port, ray_folder, refusal

from disagg_ray import Connection, Request, cli, connect
from disagg_ray.driver.names import find_replicas, services
from disagg_ray.service import lifecycle

T2V = "conf/tiny_t2v.yaml"
RAY = str(Path(sys.executable).with_name("ray"))
OVERRIDES = (
    "stages.transformer={replicas: {min: 1, max: 2}, num_cpus: 2, num_threads: 1}", "service.cluster_grows=true",
    "service.target_wait_s=2", "service.patience_s=1", "service.idle_s=5",
)  # fmt: skip
NODE = {"resources": {"CPU": 2}, "node_config": {}}
"""Room for one transformer, or for an encoder and a decoder."""
DEADLINE_S = 180.0


def cluster_config(address: str, head_cpus: int) -> dict[str, Any]:
    provider = {
        "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
        "disable_launch_config_check": True, "gcs_address": address,
    }  # fmt: skip
    head = NODE | {"resources": {"CPU": head_cpus}, "max_workers": 0}
    types = {"ray.head.default": head, "worker": NODE | {"min_workers": 0, "max_workers": 3}}
    return {
        "cluster_name": "growing", "max_workers": 3, "upscaling_speed": 1.0, "idle_timeout_minutes": 0.1,
        "provider": provider, "available_node_types": types, "head_node_type": "ray.head.default", "auth": {},
        "docker": {}, "file_mounts": {}, "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "cluster_synced_files": [], "rsync_exclude": [],
        "rsync_filter": [], "head_start_ray_commands": [], "worker_start_ray_commands": [],
        "file_mounts_sync_continuously": False,
    }  # fmt: skip


@contextmanager
def growing_cluster(folder: Path, head_cpus: int = 2) -> Iterator[str]:
    """Start a head with an autoscaler, as a process of its own; give its address."""
    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    (folder / "cluster.yaml").write_text(json.dumps(cluster_config(address, head_cpus)))
    options = [
        f"--port={address.rpartition(':')[2]}",
        f"--num-cpus={head_cpus}",
        f"--autoscaling-config={folder / 'cluster.yaml'}",
    ]
    options += ["--include-dashboard=false", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_folder() as own, (folder / "head.log").open("w") as log:
        options.append(f"--temp-dir={own}")
        head = subprocess.Popen([RAY, "start", "--head", "--block", *options], env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: not refusal(address) or head.poll() is not None, "the head did not come up")
            assert head.poll() is None, (folder / "head.log").read_text()
            yield address
        finally:
            processes = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(90)
            for process in processes:  # the nodes that the autoscaler started
                with suppress(psutil.NoSuchProcess):
                    process.kill()


wait_until = partial(helpers.wait_until, timeout_s=DEADLINE_S)


def num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    lifecycle.NOTICE_S = 2.0
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {what}; nodes: {num_nodes()}", flush=True)

    with growing_cluster(Path(sys.argv[1])) as address:
        ray.init(address=address, logging_level="ERROR")
        assert num_nodes() == 1
        tell("the head is up")
        assert cli.main(["up", "grow", "--config", T2V, *OVERRIDES]) == 0
        assert num_nodes() > 1
        tell("a pipeline stands that the head has no room for")
        before = num_nodes()
        with connect("grow") as connection:
            sizes = {"num_frames": 5, "num_inference_steps": 60}
            handles = [connection.submit(Request(prompt="a cat", seed=seed, **sizes)) for seed in range(30)]
            wait_until(lambda: num_replicas(connection) == 2, "it did not scale out")
            tell("it has scaled out")
            assert num_nodes() > before
            for handle in handles[8:]:
                handle.cancel()  # there were so many only to make it grow
            assert all(handle.result(DEADLINE_S).data for handle in handles[:8])
            tell("the first are done")
            wait_until(lambda: num_replicas(connection) == 1, "it did not scale in")
            tell("it has scaled in")
        assert cli.main(["down", "grow"]) == 0
        assert (services(), find_replicas("grow")) == ([], [])
        wait_until(lambda: num_nodes() == 1, "idle nodes stay")
        tell("it is down")
        ray.shutdown()
    print("grew and shrank")


def num_replicas(connection: Connection) -> int:
    return sum(replica.stage == "transformer" for replica in connection.replicas)


if __name__ == "__main__":
    main()

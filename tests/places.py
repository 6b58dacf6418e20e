"""Services on chosen nodes and shared GPUs: up, ls, scale, down on three nodes; their GPUs are numbers only.

python tests/places.py    # ends with 0 if all was where it was asked for, and nothing was left
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
from functools import partial
from typing import Any

import helpers
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from disagg_ray import Request, cli, connect
from disagg_ray.driver.names import NAMESPACE, find_replicas, services

T2V = "conf/tiny_t2v.yaml"
SMALL = Request(prompt="a red circle", seed=1, num_frames=9, num_inference_steps=2)
HALF = "{replicas: 2, num_gpus: 0.5, device: cpu}"
GROUPS = "{near: {label_selector: {zone: b}}, far: {resources: {disk: 1}}}"
SHARED = (
    f"stages.encoder={HALF}", f"stages.decoder={HALF}", "share_gpu=[encoder, decoder]",
    f"stages.transformer={{num_gpus: 1, device: cpu, groups: {GROUPS}}}",
)  # fmt: skip
APART = ("stages.encoder.label_selector={zone: b}", "stages.decoder.resources={disk: 1}")
DEADLINE_S = 180.0


def disagg_ray(*arguments: str, status: int = 0) -> str:
    """Run the command; return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        found = cli.main(arguments)
    print("$ disagg-ray", *arguments, f"-> {found}\n{out.getvalue()}", flush=True)
    assert found == status, (arguments, out.getvalue(), err.getvalue())
    return out.getvalue() + err.getvalue()


wait_until = partial(helpers.wait_until, timeout_s=DEADLINE_S)


def nodes_of(name: str) -> dict[str, str]:
    """Return the node of each living replica, by its name."""
    prefix = f"disagg_ray-{name}/"
    return {
        actor["Name"].removeprefix(prefix).partition(".")[0]: actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["Name"].startswith(prefix) and actor["State"] == "ALIVE" and actor["ActorClassName"] != "Supervisor"
    }


def listed(name: str) -> dict[str, Any]:
    (shown,) = (each for each in json.loads(disagg_ray("ls", "--json")) if each["name"] == name)
    return dict(shown)


def groups() -> list[str]:
    found: dict[str, Any] = placement_group_table()
    return [group["name"] for group in found.values() if group["state"] != "REMOVED"]


def check_nothing_left(name: str) -> None:
    assert (name in services(), find_replicas(name), groups()) == (False, [], [])
    wait_until(lambda: ray.available_resources().get("GPU") == 6, "GPUs are not given back")


def drain_while_one_runs(name: str) -> None:
    """Take a pipeline down with --drain: what runs finishes."""
    with connect(name) as connection:
        running = connection.submit(Request(prompt="a cat", num_frames=17, num_inference_steps=20))
        disagg_ray("down", name, "--drain")
        assert running.result(DEADLINE_S).data
    check_nothing_left(name)


def share_and_group(near: str, far: str) -> None:
    disagg_ray("up", "shared", "--config", T2V, *SHARED)
    where = nodes_of("shared")
    for index in range(2):
        assert where[f"encoder-{index}"] == where[f"decoder-{index}"]
    assert (where["transformer-0"], where["transformer-1"]) == (near, far)
    assert sorted(groups()) == ["disagg_ray-shared/0", "disagg_ray-shared/1"]
    assert "keep their number" in disagg_ray("scale", "shared", "encoder=3", status=2)
    assert "keep their number" in disagg_ray("scale", "shared", "transformer=3", status=2)
    with connect("shared") as connection:
        video = connection.generate(SMALL).data
        os.kill(connection.snapshot().pid, signal.SIGKILL)
        assert connection.generate(SMALL).data == video
        assert len(groups()) == 2
        (victim,) = (replica for replica in connection.replicas if replica.name == "decoder-1")
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: connection.num_restarts["decoder"] == 1, "no decoder came back")
    assert nodes_of("shared")["decoder-1"] == where["encoder-1"]
    drain_while_one_runs("shared")


def one_by_one(near: str, far: str) -> None:
    disagg_ray("up", "apart", "--config", T2V, *APART, "--only", "encoder")
    assert "incomplete: encoder-0" in disagg_ray("ls")
    assert listed("apart")["state"] == "incomplete: encoder-0"
    assert "no service named 'apart' in this cluster" in disagg_ray("scale", "apart", "encoder=2", status=2)
    disagg_ray("up", "apart", "--config", T2V, *APART, "--only", "decoder")
    disagg_ray("up", "apart", "--config", T2V, *APART, "--only", "transformer", "--here")
    head = ray.get_runtime_context().get_node_id()
    assert nodes_of("apart") == {"encoder-0": near, "decoder-0": far, "transformer-0": head}
    disagg_ray("scale", "apart", "encoder=2", "transformer=2")
    wait_until(lambda: len(nodes_of("apart")) == 5, "there are too few replicas")
    wait_until(lambda: all(s["ready"] == s["wanted"] for s in listed("apart")["stages"]), "not all are ready")
    where = nodes_of("apart")
    assert (where["encoder-1"], where["transformer-1"]) == (near, head)
    drain_while_one_runs("apart")


def half_started() -> None:
    disagg_ray("up", "half", "--config", T2V, *SHARED, "--only", "encoder")
    assert len(groups()) == 2
    disagg_ray("down", "half")
    check_nothing_left("half")


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 2, "include_dashboard": False})
    try:
        places = [
            cluster.add_node(num_cpus=8, num_gpus=2, labels={"zone": "b"}),
            cluster.add_node(num_cpus=8, num_gpus=2, resources={"disk": 2}),
        ]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="elsewhere", log_to_driver=False)
        near, far = (node.node_id for node in places)
        watchdog = threading.Timer(600, os.kill, (os.getpid(), signal.SIGKILL))
        watchdog.daemon = True
        watchdog.start()
        share_and_group(near, far)
        one_by_one(near, far)
        half_started()
        ray.shutdown()
        print(f"nothing left in {NAMESPACE}")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()

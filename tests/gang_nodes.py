"""A gang whose ranks lie on two nodes: the node of one of them dies in mid-step, and the request goes on elsewhere.

python tests/gang_nodes.py FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import ray
from faulty import faulty_replicas
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from disagg_ray import LocalPipeline, Pipeline, Request
from disagg_ray.replica.messages import ReplicaInfo

T2V = Path(__file__).parent.parent / "conf/tiny_t2v.yaml"
T = "stages.transformer"
ONE_THREAD = f"{T}.num_threads=1"
SPREAD = (f"{T}.parallel={{ulysses: 2, spread: true}}", f"{T}.resources.rank=1", ONE_THREAD, "failures.stall_s=30")
REQUEST = Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=4, id="struck")

wait_until = partial(helpers.wait_until, timeout_s=240.0)


def nodes_of_ranks() -> list[str]:
    """Return the nodes of the only gang's ranks, in their order; none while another follows it."""
    table: dict[str, Any] = placement_group_table()
    gangs = [group["bundles_to_node_id"] for group in table.values() if group["state"] != "REMOVED"]
    return [gangs[0][rank] for rank in sorted(gangs[0])] if len(gangs) == 1 else []


def is_elsewhere(node: str) -> bool:
    """Return whether the only gang has no rank on a node."""
    nodes = nodes_of_ranks()
    return len(nodes) == 2 and node not in nodes


def gang(pipeline: Pipeline) -> ReplicaInfo:
    wait_until(lambda: any(replica.ranks for replica in pipeline.replicas), "no gang serves")
    return next(replica for replica in pipeline.replicas if replica.ranks)


def lose_a_node(rank: int, cluster: Cluster, pipeline: Pipeline, faults: Any, video: bytes | None) -> None:
    """End the node of a rank while it computes."""
    before, where = gang(pipeline), nodes_of_ranks()
    assert len(set(where)) == 2, f"the ranks lie on one node: {where}"
    faults.set("transformer.step", "wait")
    request = replace(REQUEST, id=f"struck-{rank}")
    handle = pipeline.submit(request)
    faults.await_arrival("transformer.step")
    lost = next(node for node in cluster.worker_nodes if node.node_id == where[rank])
    cluster.remove_node(lost, allow_graceful=False)
    faults.clear("transformer.step")
    assert handle.result(240.0).data == video
    assert faults.times_computed(request.id)["encoder"] == 1, "what was finished was computed again"
    wait_until(lambda: not any(helpers.lives(rank.pid) for rank in before.ranks), "a rank of the lost gang lives on")
    wait_until(lambda: is_elsewhere(where[rank]), "the gang is not replaced")


def main() -> None:
    with LocalPipeline.from_config(T2V, ONE_THREAD) as local:
        video = local.generate(REQUEST).data
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, "include_dashboard": False}, connect=True)
    for _ in range(4):
        cluster.add_node(num_cpus=2, resources={"rank": 1})
    cluster.wait_for_nodes()
    with faulty_replicas(Path(sys.argv[1])) as faults, Pipeline.from_config(T2V, *SPREAD) as pipeline:
        for rank in range(2):
            lose_a_node(rank, cluster, pipeline, faults, video)
    wait_until(lambda: all(g["state"] == "REMOVED" for g in placement_group_table().values()), "bundles are left")
    ray.shutdown()
    cluster.shutdown()
    print("the gang went on without either node")


if __name__ == "__main__":
    main()

"""A driver that loses calls to its replicas, and their answers: Ray drops them when RAY_testing_rpc_failure says so.

python tests/blips.py FOLDER    # prints how often a replica was called again
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path

from faulty import faulty_replicas
from helpers import wait_until_empty

from disagg_ray import LocalPipeline, Pipeline, Request

T2V = "conf/tiny_t2v.yaml"
NAMES = [f"blip-{number}" for number in range(8)]


class Again(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "called again" in record.msg


def ask(name: str) -> Request:
    return Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=2, id=name)


def main() -> None:
    again, logger = Again(), logging.getLogger("disagg_ray")
    logger.addHandler(again)
    logger.setLevel(logging.INFO)
    video = LocalPipeline.from_config(T2V).generate(ask("local")).data
    with faulty_replicas(Path(sys.argv[1])) as faults, Pipeline.from_config(T2V, "fused=true") as pipeline:
        results = list(pipeline.generate_all(map(ask, NAMES)))
        assert all(result.data == video and result.stages[0].attempts == 1 for result in results)
        assert (computed := Counter(name for _, _, name in faults.computed())) == dict.fromkeys(NAMES, 1), computed
        wait_until_empty(pipeline, 120.0)
        assert pipeline.num_restarts == {"fused": 0}
    print(again.count)


if __name__ == "__main__":
    main()

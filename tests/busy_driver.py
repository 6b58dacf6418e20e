"""A driver that runs a tiny pipeline, and reports what another, busy model and HTTP service would, until stdin closes.

python tests/busy_driver.py 127.0.0.1:8265    # where Ray's dashboard shall listen
"""

import select
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray

from disagg_ray import Pipeline, Request
from disagg_ray.driver.metrics import Metrics
from disagg_ray.http.metrics import Metrics as HttpMetrics
from disagg_ray.replica.messages import Health, RankMemory
from disagg_ray.result import StageTiming

STAGES = ("encoder", "transformer", "decoder")
TIMING = StageTiming(
    stage="encoder", replica="encoder-0", queue_s=0.5, pull_s=0.25, started=0.0, compute_s=0.7, publish_s=0.125,
    pulled_bytes=1 << 20, route="tcp", peak_bytes=0,
)  # fmt: skip


HEALTH = Health(
    bytes_in_use=25, bytes_quarantined=0, pool_bytes=100, stalled={}, bytes_kept=0, cache_hits=0,
    cache_misses=0, memory=(RankMemory(1 << 30, 1 << 31),) * 2, num_videos=0,
)  # fmt: skip


def report_http(metrics: HttpMetrics) -> None:
    """Report what one job brings about."""
    metrics.accepted("alice")
    metrics.answered("/v1/videos", 200, 0.01)
    metrics.first_event(0.2)
    metrics.queue({"tiny": 2})
    metrics.flush()


def report(metrics: Metrics, health: Health) -> None:
    """Report what one request and one health poll bring about."""
    for stage in STAGES:
        replica = f"{stage}-0"
        metrics.attempt(stage, "ok")
        metrics.steps(stage, replica, 4)
        metrics.stage_finished(replace(TIMING, stage=stage, replica=replica))
        metrics.encoded(stage, replica, 0.2)
        metrics.scaled(stage, 1, 2, "wait")
        metrics.queue_depth(stage, 3)
        metrics.replicas(stage, ready=1, starting=1)
        metrics.replica_health(stage, replica, health)
    metrics.written(0.03)
    metrics.task_restarted("count")
    metrics.request_finished("done", 4.0)
    metrics.in_flight(2)
    metrics.refresh()


def generate(over: threading.Event) -> None:
    """Make three videos of four steps, then keep the pipeline up."""
    with Pipeline.from_config("conf/tiny_t2v.yaml") as pipeline:
        for color in ("red", "green", "blue"):
            prompt = f"a {color} circle moves left"
            result = pipeline.generate(Request(prompt, num_frames=9, num_inference_steps=4, negative_prompt="a square"))
            pipeline.note_written(result.seconds)
        over.wait()


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    ray.init(
        address="local", num_cpus=4, include_dashboard=True, dashboard_host=host, dashboard_port=int(port),
        logging_level="ERROR",
    )  # fmt: skip
    metrics, http = Metrics("Wan-AI/tiny", STAGES), HttpMetrics()
    health = HEALTH
    over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(generate, over)
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            health = replace(health, cache_hits=health.cache_hits + 3, cache_misses=health.cache_misses + 1)
            report(metrics, health)
            report_http(http)
        over.set()
        running.result()
    ray.shutdown()


if __name__ == "__main__":
    main()

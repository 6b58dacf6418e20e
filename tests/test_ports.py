"""A host's few ports serve one replacement after another, and whatever strangers say there."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import replace

import pytest
from helpers import free_ports, wait_until

from disagg_ray import Pipeline, Request
from disagg_ray.config.transport import TransportConfig
from disagg_ray.driver.pool import DriverPool

pytestmark = pytest.mark.proof

REQUEST = Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=2)


def test_replacements_serve_though_every_port_was_a_dead_ones(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = TransportConfig(port_range=free_ports(24)).ports
    assert ports is not None
    settings = ["fused=true", f"transport.port_range={ports[0]}-{ports[-1]}"]
    with Pipeline.from_config("conf/tiny_t2v.yaml", *settings) as pipeline:
        (first,) = pipeline.replicas
        video = pipeline.generate(REQUEST).data
        dead = {f"{first.host}:{port}" for port in ports}
        known = DriverPool.known_sessions.fget
        monkeypatch.setattr(DriverPool, "known_sessions", property(lambda self: known(self) | dead))
        for number in range(1, 3):
            os.kill(pipeline.replicas[0].pid, signal.SIGKILL)
            wait_until(lambda: pipeline.num_restarts["fused"] == number, "no replacement", 240)  # noqa: B023
            assert not {*pipeline.replicas[0].sessions} & dead
            assert pipeline.generate(REQUEST).data == video


def test_strangers_bytes_at_every_port_cost_a_pipeline_nothing(cluster: None) -> None:
    ports = TransportConfig(port_range=free_ports(24)).ports
    assert ports is not None
    settings = [f"transport.port_range={ports[0]}-{ports[-1]}", "transport.timeout_s=5"]
    with Pipeline.from_config("conf/tiny_t2v.yaml", *settings) as pipeline:
        video, pids = pipeline.generate(REQUEST).data, [replica.pid for replica in pipeline.replicas]
        handles = [pipeline.submit(replace(REQUEST, id=f"request-{number}")) for number in range(8)]
        for port in ports:
            for data in (b"\5" + bytes(7) + b"[1,2]", b"\6" + bytes(7) + b"\1[1,2]", b"GET / HTTP/1.1\r\n\r\n" * 99):
                with suppress(OSError), socket.create_connection((pipeline.replicas[0].host, port), 0.5) as stranger:
                    stranger.sendall(data)
        assert [handle.result().data for handle in handles] == [video] * 8
        assert [replica.pid for replica in pipeline.replicas] == pids

"""The doctor: each check names what is broken, and what to do about it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from http_load import find

from disagg_ray import LocalPipeline, cli
from disagg_ray.config.load import load_config
from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor import Check, exit_status, print_checks, to_json
from disagg_ray.doctor.cluster import (
    ALL_PAIRS,
    check_clock,
    check_cluster,
    check_resources,
    check_versions,
    pairs,
    probe_devices,
)
from disagg_ray.doctor.machine import (
    Survey,
    check_disk,
    check_libibverbs,
    check_rdma,
    check_shm,
    survey,
)
from disagg_ray.doctor.memory import Need, Needs, check_gpu_memory, check_host_memory, check_model, measure
from disagg_ray.doctor.probe import Link, Measured, Opened, Probe, check_link
from disagg_ray.doctor.probe import measure as measure_pull
from disagg_ray.doctor.security import (
    Port,
    check_auth,
    check_dashboard,
    check_metrics_ports,
    check_mooncake_ports,
    check_ports,
    check_token,
)
from disagg_ray.doctor.software import (
    Gpu,
    Gpus,
    check_gpus,
    check_mooncake,
    check_python,
    check_requirements,
)
from disagg_ray.errors import TransferError
from disagg_ray.replica.software import installed_wheels, versions
from disagg_ray.transfer import routes
from disagg_ray.transfer.handoff import AttemptKey

T2V = "conf/tiny_t2v.yaml"
TRANSPORT = TransportConfig(timeout_s=5)
GB = 10**9
NBYTES = 2**20

CPU, CUDA12, CUDA13 = (f"mooncake-transfer-engine{suffix}" for suffix in ("-non-cuda", "", "-cuda13"))
WHEELS = [
    ([CPU], None, "ok", ""),
    ([CUDA12], "12.8", "ok", ""),
    ([CUDA13], "13.0", "ok", ""),
    ([], None, "fail", f"pip install '{CPU}<0.4'"),
    ([], "12.8", "fail", f"pip install '{CUDA12}<0.4'"),
    ([CUDA12], None, "fail", f"pip uninstall -y {CUDA12} && pip install '{CPU}<0.4'"),
    ([CUDA12], "13.0", "fail", f"pip install '{CUDA13}<0.4'"),
    ([CUDA13], "12.8", "fail", f"pip install '{CUDA12}<0.4'"),
    ([CPU], "12.8", "warn", f"pip install '{CUDA12}<0.4'"),
    ([CUDA13], "14.1", "fail", "install a torch for CUDA 12 or 13"),
    ([CPU, CUDA12], None, "fail", f"pip uninstall -y {CPU} {CUDA12}"),
]


@pytest.mark.parametrize(("wheels", "build", "status", "remedy"), WHEELS)
def test_mooncakes_wheel_must_fit_torch(wheels: list[str], build: str | None, status: str, remedy: str) -> None:
    check = check_mooncake(dict.fromkeys(wheels, "0.3.13"), build)
    assert check.status == status
    assert remedy in check.remedy
    assert build == "14.1" or all(wheel in check.detail for wheel in wheels)


GPUS = [
    (Gpus(None, None, ()), "ok", "none"),
    (Gpus("12.8", "570.1", (Gpu("H100", 80 * GB),)), "ok", "H100 80.0 GB"),
    (Gpus("12.8", None, ()), "warn", "no NVIDIA driver"),
    (Gpus(None, "570.1", ()), "warn", "built for CPUs"),
    (Gpus("13.0", "570.1", ()), "fail", "torch finds no GPU"),
]


@pytest.mark.parametrize(("gpus", "status", "detail"), GPUS, ids=[detail for *_, detail in GPUS])
def test_torch_is_compared_with_the_driver(gpus: Gpus, status: str, detail: str) -> None:
    check = check_gpus(gpus)
    assert (check.status, detail in check.detail) == (status, True)


def test_python_outside_the_supported_range_fails() -> None:
    assert check_python((3, 10)).status == check_python((3, 14)).status == "fail"
    assert check_python().status == "ok"


def test_packages_of_another_version_fail_by_name() -> None:
    wrong = list(check_requirements(["ray[default]==1.0.*", "torch>=2", "no-such-package", 'pytest==0; extra == "x"']))
    assert [check.remedy for check in wrong] == ["pip install 'ray[default]==1.0.*'", "pip install 'no-such-package'"]
    assert [check.status for check in check_requirements()] == ["ok"]
    assert len(installed_wheels()) == 1


def test_a_missing_libibverbs_is_named() -> None:
    check = check_libibverbs("libibverbs-that-is-not-there.so.1")
    assert (check.status, check.remedy) == ("fail", "apt-get install libibverbs1")
    assert "libibverbs-that-is-not-there.so.1" in check.detail
    assert check_libibverbs().status == "ok"


MEMLOCK = """
import resource
from disagg_ray.doctor.machine import check_memlock
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
for devices, nbytes in (((), 10**9), (("mlx5_0",), 10**9), (("mlx5_0",), 10**4), (("mlx5_0",), None)):
    print(check_memlock(devices, nbytes).status)
"""


def test_a_small_memlock_limit_fails_where_rdma_must_lock_a_pool() -> None:
    done = subprocess.run([sys.executable, "-c", MEMLOCK], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["ok", "fail", "ok", "warn"]


def make_device(folder: Path, *, state: str = "4: ACTIVE\n", gid: str = "fe80:0000:0000:0001\n") -> None:
    """Write what the kernel shows of an RDMA device."""
    (folder / "gids").mkdir(parents=True)
    (folder / "state").write_text(state)
    (folder / "gids" / "0").write_text(gid)
    (folder / "gids" / "1").write_text("0000:0000:0000:0000\n")


@pytest.fixture
def infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the empty folder in which RDMA devices are looked for."""
    monkeypatch.setattr(routes, "INFINIBAND", tmp_path)
    return tmp_path


def test_each_rdma_device_is_looked_at(infiniband: Path) -> None:
    make_device(infiniband / "mlx5_0" / "ports" / "1")
    make_device(infiniband / "mlx5_1" / "ports" / "1", state="1: DOWN\n")
    make_device(infiniband / "mlx5_2" / "ports" / "1", gid="0000:0000:0000:0000\n")
    checks = list(check_rdma(replace(TRANSPORT, device_name="mlx5_0,mlx5_9")))
    assert [check.status for check in checks] == ["fail", "ok", "warn", "warn"]
    assert "'mlx5_9' is none of this machine's devices: mlx5_0, mlx5_1, mlx5_2" in checks[0].detail
    assert checks[1].detail == "mlx5_0: 1 of 1 ports active, 1 GIDs"


@pytest.mark.usefixtures("infiniband")
def test_rdma_without_a_device_fails_only_when_it_was_asked_for() -> None:
    assert [check.status for check in check_rdma(TRANSPORT)] == ["skipped"]
    assert [check.status for check in check_rdma(replace(TRANSPORT, protocol="rdma"))] == ["fail"]


def test_little_room_is_a_warning(tmp_path: Path) -> None:
    assert check_shm("/dev/shm", least=2**60).status == check_disk(tmp_path / "new", least=2**60).status == "warn"
    assert check_disk(tmp_path / "new", least=0).status == "ok"


def test_a_token_that_others_can_read_fails(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert check_token(token).status == "skipped"
    token.write_text("secret")
    for mode, status in ((0o600, "ok"), (0o644, "fail"), (0o640, "fail")):
        token.chmod(mode)
        assert check_token(token).status == status
    assert check_token(token).remedy == f"chmod 600 {token}"


def test_a_ray_without_a_token_is_a_warning() -> None:
    statuses = [check_auth(mode).status for mode in ("token", "disabled", None)]
    assert statuses == ["ok", "warn", "warn"]


def test_open_ports_without_a_token_are_listed() -> None:
    mine = Port("raylet", "127.0.0.1", 1001)
    guarded = Port("raylet", "0.0.0.0", 1002, guarded=True)
    free = Port("gcs_server", "::", 1003)
    assert check_ports([mine, guarded]).status == "ok"
    assert check_ports([mine, guarded, free]).detail.endswith("from other machines: gcs_server [::]:1003")
    assert check_ports([]).status == "skipped"


def test_ports_that_serve_metrics_to_other_machines_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg_ray.doctor.security.METRICS_S", 2.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/metrics"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("0.0.0.0", 0), Handler) as server, socket.create_server(("0.0.0.0", 0)) as silent:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served, other = (Port("agent", "0.0.0.0", number) for number in (server.server_port, silent.getsockname()[1]))
        ports = [served, other, replace(served, owner="worker"), replace(served, address="127.0.0.1")]
        check = check_metrics_ports(ports)
        server.shutdown()
    assert (check.status, check.detail.endswith(f"without the token: agent 0.0.0.0:{served.number}")) == ("warn", True)
    assert check_metrics_ports([other]).status == "skipped"


def test_a_dashboard_off_loopback_is_a_warning() -> None:
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert check_dashboard([Port("dashboard", address, 8265)]).status == "ok"
    for address in ("0.0.0.0", "10.0.0.1"):
        assert check_dashboard([Port("dashboard", address, 8265)]).status == "warn"


def test_clocks_further_apart_than_can_be_measured_are_a_warning() -> None:
    assert [check_clock(*skew).status for skew in ((0.4, 0.0), (1.0, 0.6), (0.6, 0.05), (-3.0, 0.1))] == [
        "ok", "ok", "warn", "warn",
    ]  # fmt: skip


def test_other_versions_on_a_node_fail_by_name() -> None:
    here = versions()
    assert check_versions(here, dict(here)).status == "ok"
    check = check_versions(here, here | {"torch": "2.11.0"})
    assert check.status == "fail"
    assert check.detail == f"torch 2.11.0, but {here['torch']} in the driver"


@pytest.mark.parametrize("count", [1, 2, ALL_PAIRS, ALL_PAIRS + 1, 30])
def test_every_pool_is_pulled_from_and_into(count: int) -> None:
    tried = pairs(count)
    assert len(tried) == len(set(tried)) == (count * (count - 1) if count <= ALL_PAIRS else 3 * count - 4)
    if count > 1:
        assert {a for a, _ in tried} == {b for _, b in tried} == set(range(count))


def test_a_node_has_pools_on_its_free_gpus_and_a_lone_one_has_a_pair() -> None:
    assert [probe_devices(free, alone=False) for free in (0, 1, 8)] == [["cpu"], ["cuda"], ["cuda", "cuda"]]
    assert [probe_devices(free, alone=True) for free in (0, 1)] == [["cpu", "cpu"], ["cuda", "cpu"]]


def need(*, weights: int | None, num_gpus: float = 1.0) -> Needs:
    return Needs((Need("transformer", 2, num_gpus, num_gpus > 0, weights, GB),), GB)


def test_a_stage_is_compared_with_its_share_of_a_gpu() -> None:
    gpus = [Gpu("H100", 80 * GB), Gpu("T4", 16 * GB)]
    asked = [(28 * GB, 1.0, "ok"), (None, 1.0, "ok"), (28 * GB, 0.25, "warn"), (90 * GB, 1.0, "fail")]
    for weights, num_gpus, status in asked:
        (check,) = check_gpu_memory(need(weights=weights, num_gpus=num_gpus), gpus)
        assert check.status == status
    assert [check.status for check in check_gpu_memory(need(weights=GB), [])] == ["skipped"]


def test_a_decoders_videos_take_host_memory_wherever_it_computes() -> None:
    needs = measure(load_config("conf/tiny_t2v.yaml", "limits.max_pixels=65536", "limits.max_frames=17"))
    assert [each.video_bytes for each in needs.stages] == [0, 0, 3 * 17 * 65536 * 3 * 4]  # two that wait, one is made
    decoder = Need("decoder", 2, 1, on_gpu=True, weight_bytes=GB, pool_bytes=GB, video_bytes=GB)
    assert decoder.host_bytes == 2 * GB
    assert "decoded videos on the host" in str(decoder)


def test_every_rank_of_a_gang_on_the_cpu_holds_the_weights() -> None:
    gang = replace(need(weights=GB, num_gpus=0).stages[0], num_ranks=4)
    assert gang.host_bytes == 4 * GB + GB
    assert "weights 1.0 GB at each of 4 ranks" in str(gang)
    assert measure(load_config(T2V, "stages.transformer.parallel.cfg=2")).stages[1].num_ranks == 2


def test_replicas_of_every_group_count() -> None:
    groups = ("fast.num_gpus=1", "fast.replicas=2", "slow.num_gpus=0.5")
    transformer = measure(load_config(T2V, *(f"stages.transformer.groups.{key}" for key in groups))).stages[1]
    assert (transformer.replicas, transformer.num_gpus, transformer.on_gpu) == (3, 0.5, True)


def test_stages_on_the_cpu_and_copies_of_gpu_pools_take_host_memory() -> None:
    assert check_host_memory(need(weights=GB, num_gpus=0), 4 * GB).status == "fail"  # 2 x (1 + 1) + 1 of the driver
    assert check_host_memory(need(weights=GB), 4 * GB).status == "ok"  # 2 x 1 + 1


def test_weights_are_measured_as_they_load() -> None:
    config = load_config(T2V, "model.dtype.transformer=bfloat16")
    measured = {stage.stage: stage.weight_bytes for stage in measure(config).stages}
    loaded = LocalPipeline(config).weights
    for stage, weights in loaded.items():
        assert 0.97 * sum(weights.values()) <= (measured[stage] or 0) <= sum(weights.values())


BROKEN = [
    ("transport.pool_bytes=1000", "transport.pool_bytes: 1000 is too small"),
    ("model.path=/no/such/folder", "model.path: '/no/such/folder' is no folder on this node"),
    ("stages.encoder.blocks=[decode]", "'prompt_embeds' has no producer"),
]


@pytest.mark.parametrize(("override", "detail"), BROKEN)
def test_a_configuration_that_cannot_work_is_named(override: str, detail: str) -> None:
    (check,), needs = check_model(load_config(T2V, override))
    assert (check.status, needs) == ("fail", None)
    assert detail in check.detail


@pytest.fixture(scope="module")
def probes() -> Iterator[tuple[Probe, Opened, Probe]]:
    """Give a probe, what it has published, and another that pulls."""
    producer, consumer = Probe("a", TRANSPORT, "cpu"), Probe("b", TRANSPORT, "cpu")
    opened = producer.open("127.0.0.1", NBYTES)
    consumer.open("127.0.0.1", NBYTES)
    yield producer, opened, consumer
    producer.close()
    consumer.close()


def test_a_pull_between_pools_is_measured_and_the_route_explained(probes: tuple[Probe, Opened, Probe]) -> None:
    link = probes[2].link(probes[1].handoff)
    assert [(each.route, each.error) for each in link.measured] == [("tcp", None)]
    check = check_link(link, TRANSPORT)
    assert (check.name, check.status) == ("a -> b", "ok")
    assert "auto takes tcp: no nvlink_intra at either end; no rdma at either end" in check.detail


def test_mooncakes_ports_are_those_that_came_with_the_pool(probes: tuple[Probe, Opened, Probe]) -> None:
    ports = probes[1].ports
    rpc = int(probes[1].handoff.sessions[0].name.rpartition(":")[2])
    assert rpc in [port.number for port in ports]
    assert check_mooncake_ports(ports, None).remedy.startswith("set transport.port_range")
    assert check_mooncake_ports(ports, "15000-15999").status == "ok"


def test_an_unreachable_port_is_named(probes: tuple[Probe, Opened, Probe]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        port = closed.getsockname()[1]
        session = replace(probes[1].handoff.sessions[0], name=f"127.0.0.1:{port}")
        check = check_link(probes[2].link(replace(probes[1].handoff, sessions=(session,))), TRANSPORT)
    assert check.status == "fail"
    assert "tcp fails" in check.detail
    assert check.remedy.endswith(f"nc -zv 127.0.0.1 {port}")


def test_an_exhausted_pool_is_named(probes: tuple[Probe, Opened, Probe]) -> None:
    pool, key = probes[2].pool, AttemptKey("other", 0)
    pool.reserve(key, {"tensor": NBYTES})
    measured = measure_pull(pool, probes[1].handoff, room_s=0.1)
    pool.release(key)
    check = check_link(Link("a", "b", NBYTES, (measured,), (), True), TRANSPORT)
    assert check.status == "fail"
    assert f"no room for {pool.capacity // 2} bytes" in check.detail
    assert "raise transport.pool_bytes" in check.remedy


def test_pools_without_a_common_route_fail(probes: tuple[Probe, Opened, Probe]) -> None:
    session = replace(probes[1].handoff.sessions[0], route="rdma")
    check = check_link(probes[2].link(replace(probes[1].handoff, sessions=(session,))), TRANSPORT)
    assert check.status == "fail"
    assert "no rdma at b; no tcp at a" in check.detail


def link(*measured: Measured, on_one_machine: bool = False) -> Link:
    return Link("a", "b", GB, measured, (), on_one_machine)


def test_a_broken_route_beside_a_good_one_is_a_warning() -> None:
    broken = Measured("nvlink_intra", 0.0, TransferError("refused", "a:1", GB, -1))
    check = check_link(link(broken, Measured("tcp", 0.5, None)), TRANSPORT)
    assert check.status == "warn"
    assert "tcp 2.00 GB/s; auto takes tcp" in check.detail
    assert "--pid=host" in check.remedy
    assert check.remedy.endswith("or set transport.protocol=tcp")


def test_damaged_bytes_and_a_slow_network_have_their_own_remedies() -> None:
    damaged = Measured("tcp", 0.0, TransferError("arrived damaged", "a:1", GB, 0))
    assert "dmesg" in check_link(link(damaged), TRANSPORT).remedy
    slow = Measured("tcp", 60.0, None)
    assert "iperf3" in check_link(link(slow), TRANSPORT).remedy
    assert check_link(link(slow, on_one_machine=True), TRANSPORT).status == "ok"


@pytest.mark.slow
def test_a_cluster_is_surveyed_and_its_probes_are_gone_afterwards(cluster: None) -> None:
    here = replace(survey(TRANSPORT, None), checks=())
    found = []
    for each in check_cluster(replace(load_config(T2V), transport=TRANSPORT), here, None):
        found.append(each)
        if isinstance(each, Check) and each.name == "clock":
            running = find(os.getpid(), ("ray::Probe",))
    assert (len(running), psutil.wait_procs(running, timeout=60)[1]) == (2, [])
    checks = {check.name: check for check in found if isinstance(check, Check)}
    links = [check for name, check in checks.items() if " -> " in name]
    assert [check.status for check in links] == ["ok", "ok"]
    assert all("GB/s; auto takes tcp" in check.detail for check in links)
    assert {checks[name].status for name in ("nodes", "versions", "clock", "libibverbs", "ray ports")} == {"ok"}
    assert (checks["ray metrics"].status, "agent " in checks["ray metrics"].detail) == ("warn", True)
    assert len([each for each in found if isinstance(each, Survey)]) == 1


@pytest.mark.slow
def test_what_the_cluster_lacks_fails_and_the_rest_is_ok(cluster: None) -> None:
    stages = load_config(T2V, "stages.transformer.num_gpus=1", "stages.transformer.replicas=2").stages
    assert [check.status for check in check_resources(stages)] == ["ok", "fail"]
    groups = ("fast.num_gpus=1", "fast.replicas=2", "slow.num_gpus=0.5")
    checks = list(check_resources(load_config(T2V, *(f"stages.transformer.groups.{key}" for key in groups)).stages))
    assert [check.detail.partition(" GPUs")[0] for check in checks][1:] == ["2.5"]


CHECKS = [
    Check("python", "n1", "ok", "3.12", ""),
    Check("token", "n2", "fail", "0644", "chmod 600 token"),
    Check("rdma", "", "warn", "down", "ip link show"),
]


def test_table_shows_each_remedy_and_json_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks(CHECKS)
    table = capsys.readouterr().out
    assert table.count("-> ") == 2
    assert "-> chmod 600 token" in table
    assert "1 ok, 1 warn, 1 fail" in table
    parsed = json.loads(to_json(CHECKS))
    assert (parsed["status"], exit_status([CHECKS[0], CHECKS[2]])) == (1, 0)
    assert [Check(**each) for each in parsed["checks"]] == CHECKS


def test_table_has_one_line_for_what_is_the_same_on_many_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks([Check("shm", f"n{index}", "ok", "enough", "") for index in range(9)] + CHECKS)
    table = capsys.readouterr().out
    assert table.count("shm") == 1
    assert "n0, n1, n2 and 6 more" in table
    assert "10 ok" in table


@pytest.mark.slow
def test_command_names_what_is_broken_and_its_status_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for mode, status in ((0o600, 0), (0o644, 1)):
        token.chmod(mode)
        assert cli.main(["doctor", "--local", "--json"]) == status
        parsed = json.loads(capsys.readouterr().out)
        assert parsed["status"] == status
        failed = [check["name"] for check in parsed["checks"] if check["status"] == "fail"]
        assert failed == ["token"] * status


@pytest.mark.parametrize("arguments", [["--config", "none.yaml"], ["transport.protocol=tcp"], ["--config", T2V, "x=1"]])
def test_bad_input_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1

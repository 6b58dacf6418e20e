"""What the driver counts, as the real Prometheus sees it; every expression of dashboard and rules has data."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import helpers
import pytest
import yaml

from disagg_ray.driver import metrics
from disagg_ray.http import metrics as http_metrics

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DEADLINE_S = 240.0
TOKEN = "secret"

Query = Callable[[str], list[tuple[dict[str, str], float]]]


def find_tool(name: str) -> str:
    """Return prometheus or promtool: the system's, or the one that `.ci/setup test` put beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is missing: run `.ci/setup test`, or install the package prometheus"
    return found


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict:
    return json.loads((DOCKER / "grafana" / "dashboards" / "disagg_ray.json").read_text())


def dashboard_expressions() -> list[str]:
    """Return every expression of the dashboard, Grafana's variables filled in."""
    values = {"$__rate_interval": "30s", "$__range": "1m", "$model": ".*"}
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    variables = [v["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    found += [re.fullmatch(r"label_values\((.+), \w+\)", query)[1] for query in variables]
    return [re.sub(r"\$\w+", lambda name: values[name[0]], expression) for expression in found]


def bounded(alert: dict[str, str]) -> str:
    """Return what an alert compares with its bound."""
    return re.fullmatch(r"(disagg_ray:[\w:]+) [<>] [\d.]+", alert["expr"])[1]


def free_address() -> str:
    return f"{helpers.HOST}:{helpers.free_port()}"


@pytest.fixture(scope="module")
def busy_driver() -> Iterator[str]:
    """Run a busy driver in a Ray of its own, which wants a token; give its dashboard's address."""
    quick = {"RAY_metrics_report_interval_ms": "1000", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    address = free_address()
    command = [sys.executable, str(ROOT / "tests" / "busy_driver.py"), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | quick) as driver:
        yield address
        assert driver.stdin
        driver.stdin.close()


def quick_config(address: str, token: Path) -> str:
    """Return the configuration that ships, only quicker and with this Ray's address and token."""
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    discovery["url"] = discovery["url"].replace("head:8265", address)
    discovery["refresh_interval"] = "1s"
    discovery["authorization"]["credentials_file"] = str(token)
    return yaml.safe_dump(config)


@pytest.fixture(scope="module")
def query(busy_driver: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Run the real Prometheus until it has scraped the driver; give what evaluates an expression."""
    folder, address = tmp_path_factory.mktemp("prometheus"), free_address()
    (folder / "token").write_text(TOKEN)
    (folder / "prometheus.yml").write_text(quick_config(busy_driver, folder / "token"))
    shutil.copy(DOCKER / "prometheus" / "rules.yml", folder)
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--log.level=error"]
    command = [find_tool("prometheus"), *options, f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            missing = without_numbers(partial(ask, address), ["ray_disagg_ray_requests_in_flight"])
            assert not missing, (folder / "log").read_text()
            yield partial(ask, address)
        finally:
            server.terminate()


def ask(address: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """Return labels and value of each series; none while Prometheus starts."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []
        raise AssertionError(f"{expression}: {error.read().decode()}") from error
    except (ConnectionError, urllib.error.URLError):
        return []
    return [(series["metric"], float(series["value"][1])) for series in result]


def without_numbers(query: Query, expressions: list[str]) -> list[str]:
    """Wait until every expression gives at least one series, and numbers only; return those that do not."""
    deadline = time.monotonic() + DEADLINE_S
    while missing := [e for e in expressions if not is_numbers([value for _, value in query(e)])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return missing


def is_numbers(values: list[float]) -> bool:
    return bool(values) and all(map(math.isfinite, values))


@pytest.mark.proof
def test_every_expression_of_dashboard_and_rules_gives_numbers_from_a_live_run(query: Query) -> None:
    recorded = [rule[key] for rule in rules() for key in ("record", "expr") if "record" in rule]
    alerts = [bounded(rule) for rule in rules() if "alert" in rule]
    assert len(alerts) >= 6
    assert without_numbers(query, dashboard_expressions() + recorded + alerts) == []
    assert query("ALERTS") == []


@pytest.mark.proof
def test_every_metric_arrives_under_the_name_it_is_declared_with(query: Query) -> None:
    histograms = [*metrics.HISTOGRAMS, *http_metrics.HISTOGRAMS]
    suffixed = [f"{name}_{suffix}" for name in histograms for suffix in ("bucket", "sum", "count")]
    names = [*metrics.COUNTERS, *http_metrics.COUNTERS, *metrics.GAUGES, *http_metrics.GAUGES, *suffixed]
    assert without_numbers(query, [f"ray_disagg_ray_{name}" for name in names]) == []


@pytest.mark.proof
def test_seconds_are_exact(query: Query) -> None:
    """In one scrape they all stand at the same number of reports; Ray may cut one report in two, so look again."""
    once = {"wait": 1.5, "pull": 0.75, "compute": 2.1, "publish": 0.375, "encode": 0.6, "write": 0.03}
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = query('sum by (phase) (ray_disagg_ray_phase_seconds_total{model="tiny"})')
        seconds = {labels["phase"]: value for labels, value in found}
        if seconds == pytest.approx({phase: value * seconds["wait"] / once["wait"] for phase, value in once.items()}):
            break
        assert time.monotonic() < deadline, seconds
        time.sleep(1)


@pytest.mark.proof
def test_a_real_run_is_counted(query: Query) -> None:
    """Three videos of four guided steps; the negative prompt is encoded once."""
    one_each = {"encoder": 1.0, "transformer": 1.0, "decoder": 1.0}
    expected = {
        'requests_total{MODEL, outcome="done"}': {"": 3.0},
        'attempts_total{MODEL, cause="ok"}': dict.fromkeys(one_each, 3.0),
        "denoise_steps_total{MODEL}": {"transformer": 12.0},
        "cache_misses_total{MODEL}": {"encoder": 4.0},
        "cache_hits_total{MODEL}": {"encoder": 2.0},
        "replicas_ready{MODEL}": one_each,
        "requests_in_flight{MODEL}": {"": 0.0},
        "phase_seconds_total{MODEL} > bool 0": {**one_each, "driver": 1.0},
        "transfer_bytes_total{MODEL} > bool 0": {"transformer": 1.0, "decoder": 1.0},
        "pool_capacity_bytes{MODEL} > bool 0": {**one_each, "driver": 1.0},
    }
    deadline = time.monotonic() + DEADLINE_S
    while (found := {expression: by_stage(query, expression) for expression in expected}) != expected:
        assert time.monotonic() < deadline, found
        time.sleep(1)


def by_stage(query: Query, expression: str) -> dict[str, float]:
    """Return what a metric of the real pipeline is, by stage."""
    chosen = expression.replace("MODEL", 'model="tiny-wan-t2v"')
    found = query(f"min by (stage) (ray_disagg_ray_{chosen})")
    return {labels.get("stage", ""): value for labels, value in found}


@pytest.mark.proof
def test_events_that_have_not_happened_read_zero(query: Query) -> None:
    never = 'sum by (stage, cause) (round(ray_disagg_ray_attempts_total{cause="died"}))'
    assert without_numbers(query, [never]) == []
    assert {(labels["stage"], value) for labels, value in query(never)} == {
        ("encoder", 0.0), ("transformer", 0.0), ("decoder", 0.0)
    }  # fmt: skip


def test_rules_pass_their_own_tests() -> None:
    command = [find_tool("promtool"), "test", "rules", "rules_test.yml"]
    subprocess.run(command, cwd=DOCKER / "prometheus", check=True, timeout=300)


def test_every_alert_is_tested() -> None:
    tested = (DOCKER / "prometheus" / "rules_test.yml").read_text()
    assert [rule["alert"] for rule in rules() if "alert" in rule and f'alertname="{rule["alert"]}"' not in tested] == []


def test_expressions_use_declared_metrics_only() -> None:
    text = "\n".join([*dashboard_expressions(), *(rule["expr"] for rule in rules())])
    rooms = (metrics, http_metrics)
    histograms = {
        f"{name}_{suffix}" for room in rooms for name in room.HISTOGRAMS for suffix in ("bucket", "sum", "count")
    }
    used = set(re.findall(r"ray_disagg_ray_(\w+)", text))
    assert used - histograms - {name for room in rooms for name in (*room.COUNTERS, *room.GAUGES)} == set()
    assert set(re.findall(r"disagg_ray:[\w:]+", text)) == {rule["record"] for rule in rules() if "record" in rule}


def test_the_dashboard_shows_every_metric() -> None:
    text = "\n".join([*dashboard_expressions(), *(rule["expr"] for rule in rules())])
    assert [name for name in (*metrics.COUNTERS, *metrics.GAUGES, *metrics.HISTOGRAMS) if name not in text] == []

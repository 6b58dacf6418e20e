"""What `disagg-ray serve` refuses before anything starts, and the threads of an HTTP service."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import helpers
import pytest

from disagg_ray import load_config
from disagg_ray.cli.serve import serve
from disagg_ray.errors import ConfigError, InputError, OutputError
from disagg_ray.http.files import Folder
from disagg_ray.http.link import Link
from disagg_ray.http.repeat import repeat
from disagg_ray.http.settings import make_settings

T2V = "conf/tiny_t2v.yaml"
TWICE = """
import sys
import ray
from ray import serve
from disagg_ray import StartError, load_config
from disagg_ray.http.app import serving
from disagg_ray.http.settings import make_settings

ray.init(address="local", num_cpus=1, include_dashboard=False)
serve.start(proxy_location="Disabled")
settings = make_settings(("films",), load_config("conf/tiny_t2v.yaml", f"service.folder={sys.argv[1]}"))
try:
    with serving(settings, "127.0.0.1", 0):
        pass
except StartError as error:
    serve.status()  # it still runs
    print(str(error).partition(",")[0], end="", flush=True)
finally:
    ray.shutdown()
"""


@pytest.mark.parametrize(("folder", "key"), [("memory://films", "folder"), ("s3://bucket/films", "database")])
def test_a_folder_that_keeps_no_files_or_no_database_is_refused(folder: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^invalid service\.{key}="):
        make_settings(("films",), load_config(T2V, f"service.folder={folder}"))


def test_a_folder_that_takes_no_file_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError, match=r"^service\.folder: '.*/file/probe\.mp4' cannot be written: '.*/file' is not a"
    ):
        Folder(f"{tmp_path}/file")


def test_a_folder_whose_package_is_missing_is_refused_with_its_name() -> None:
    config = load_config(T2V, "service.folder=gs://bucket/films", "service.database=sqlite:////tmp/jobs.db")
    with pytest.raises(ConfigError, match=r"^invalid service\.folder='gs://bucket/films': .*: pip install gcsfs$"):
        make_settings(("films",), config)


def test_a_service_that_cannot_be_reached_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg_ray.http.link.RETRY_S", 0.01)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    closing = Event()
    link = Link("films", load_config(T2V), 0, lambda _: None, closing)
    helpers.wait_until(lambda: bool(caplog.messages), "nothing is logged", 60)
    closing.wait(0.5)
    closing.set()
    link.close()
    (message,) = caplog.messages
    assert message.startswith("model films: ")


def test_a_thread_that_repeats_outlives_an_error_and_reports_it(caplog: pytest.LogCaptureFixture) -> None:
    closing, calls = Event(), list[int]()

    def call() -> None:
        calls.append(1)
        if len(calls) > 1:
            closing.set()
        raise ValueError("once")

    repeat("looking", call, lambda: 0.0, closing)
    assert (len(calls), caplog.messages) == (2, ["looking", "looking"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", T2V, "--host", "0.0.0.0"], r"invalid --host='0\.0\.0\.0': without keys"),
        (["--connect", "x", "--speed", "fast"], "--speed: it goes with --config"),
        (["--config", T2V, "--speed", "slow"], "argument --speed: invalid choice: 'slow'"),
        (["--config", T2V, "--port", "-1"], "^invalid --port=-1: must be from 0 to 65535$"),
        (
            ["--config", T2V, "--host", "none.invalid"],
            r"^invalid --host='none\.invalid': .*; must be an address of this",
        ),
        (
            ["--config", T2V, "--host", "192.0.2.1"],
            r"^invalid --host='192\.0\.2\.1': must be an address of this machine$",
        ),
        (
            ["--config", T2V, "service.api_keys=/dev/null"],
            "^invalid service.api_keys='/dev/null': it is no regular file",
        ),
    ],
)
def test_what_serve_cannot_do_is_refused_before_ray_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg_ray.driver.cluster.Cluster.__init__", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match=message):
        serve(["--port", "0", *arguments])


@pytest.mark.slow
def test_a_cluster_where_ray_serve_runs_already_is_refused_and_left_alone(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", TWICE, str(tmp_path)], check=False, capture_output=True, text=True)
    assert result.stdout.endswith("HTTP service: Ray Serve runs already on this cluster"), result.stderr


@pytest.mark.parametrize("key", ["folder", "database"])
def test_a_full_disk_is_refused_before_ray_starts(
    key: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg_ray.driver.cluster.Cluster.__init__", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    places = {"folder": str(tmp_path / "files"), "database": f"sqlite:///{tmp_path}/jobs.db"}
    places |= {key: {"folder": str(small_disk), "database": f"sqlite:///{small_disk}/jobs.db"}[key]}
    given = [f"service.{name}={place}" for name, place in places.items()]
    with pytest.raises(InputError, match=f"{small_disk}.*(No space left|disk is full)"):
        serve(["--config", T2V, "--port", "0", *given])

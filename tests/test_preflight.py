"""What can be known before Ray starts is said before it starts, in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from disagg_ray import CheckpointError, ConfigError, LocalPipeline, environment, load_config
from disagg_ray.doctor.memory import check_model as examine_model
from disagg_ray.driver.cluster import Cluster, _make_token
from disagg_ray.models.preflight import check_temporary_folder

T2V, A14B = "conf/tiny_t2v.yaml", "conf/tiny_a14b_t2v.yaml"
LONG = "/tmp/" + "a" * 60


@pytest.fixture(scope="module")
def unbounded(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a model of two transformers that does not say when the second takes over."""
    folder = tmp_path_factory.mktemp("unbounded") / "model"
    shutil.copytree(checkpoint("tiny-a14b-t2v"), folder, copy_function=os.link)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    return folder


def test_two_transformers_without_a_boundary_are_refused_before_anything_starts(unbounded: Path) -> None:
    config = load_config(A14B, f"model.path={unbounded}")
    for start in (LocalPipeline, Cluster):
        with pytest.raises(ConfigError, match=r"^model\.boundary_ratio: null, and .* two transformers .*; give the"):
            start(config)
    (check,), _ = examine_model(config)
    assert (check.status, "model.boundary_ratio" in check.detail) == ("fail", True)
    assert LocalPipeline(load_config(A14B, f"model.path={unbounded}", "model.boundary_ratio=0.5")).weights


def test_one_transformer_has_no_boundary() -> None:
    with pytest.raises(ConfigError, match=r"^model\.boundary_ratio: 0\.5, but .* one transformer; write null"):
        Cluster(load_config(T2V, "model.boundary_ratio=0.5"))


def run(env: dict[str, str | None], *overrides: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in (os.environ | env).items() if value is not None and name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "disagg_ray.cli", "generate", "--config", T2V, "--prompt", "x"]
    output = ["--output", "/tmp/never.mp4", *overrides]
    return subprocess.run([*command, *output], env=given, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "override", "said"),
    [
        ({}, "model.path=/nonexistent/wan", "model.path: '/nonexistent/wan' is no folder on this node"),
        ({"HOME": "/proc/none"}, "fused=true", "HOME: Ray's token '/proc/none/.ray/auth_token' cannot be written"),
        ({"RAY_TMPDIR": LONG}, "fused=true", f"invalid RAY_TMPDIR='{LONG}': must be at most 39 characters"),
    ],
    ids=["folder", "home", "ray's temporary"],
)
def test_what_ray_would_stumble_over_is_one_line_and_status_2(
    env: dict[str, str | None], override: str, said: str
) -> None:
    done = run(env, override)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert said in done.stderr


def test_a_shape_that_is_misspelt_and_a_temporary_folder_that_is_too_long_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean tiny-t2v\?"):
        Cluster(load_config(T2V, "model.path=random:tiny-t2w"))
    monkeypatch.setenv("TMPDIR", LONG)
    with pytest.raises(ConfigError, match=f"^invalid TMPDIR='{LONG}': must be at most 39 characters"):
        check_temporary_folder()


@pytest.mark.parametrize(("name", "folder"), [("TMPDIR", "/tmp/" + "a" * 34), ("RAY_TMPDIR", "/tmp")])
def test_a_temporary_folder_that_is_short_enough_is_taken(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", LONG)
    monkeypatch.setenv(name, folder)
    check_temporary_folder()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(ConfigError, match=r"^HOME: not set"):
        environment.home()


@pytest.mark.parametrize("override", ["cluster.num_gpus=2", "cluster.dashboard=true"])
@pytest.mark.parametrize("given", ["cluster.address", "RAY_ADDRESS"])
def test_what_only_a_cluster_of_our_own_has_is_refused_where_one_is_joined(
    override: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    addressed = ("cluster.address=10.9.8.7:6379",) if given == "cluster.address" else ()
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"^invalid {key}={value}: must be left out: .* is joined$"):
        Cluster(load_config(T2V, *addressed, override))


def test_all_who_start_a_cluster_at_once_for_the_first_time_see_one_whole_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num, start = 8, Barrier(8)

    def make(path: Path) -> str:
        start.wait(60)
        _make_token()
        return path.read_text()

    with ThreadPoolExecutor(num) as threads:
        for number in range(50):
            path = tmp_path / f"token{number}"
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
            assert {*threads.map(make, [path] * num)} == {path.read_text()}
            assert len(path.read_text()) == 64
    assert len(list(tmp_path.iterdir())) == 50

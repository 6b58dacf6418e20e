"""Replicas and services run the code that drivers and clients do, whatever lies in the working folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_ray.errors import StartError
from disagg_ray.replica.software import PACKAGE, Software, check_same, software

CONFIG = Path("conf/tiny_t2v.yaml").resolve()
GENERATE = ["generate", "--config", str(CONFIG), "--prompt", "a red circle", "--height", "32", "--width", "32"]
SMALL = ["--num-frames", "5", "--num-inference-steps", "2", "fused=true", "progress=false"]
OTHER_CODE = f"""
import ray, sys
from disagg_ray import Pipeline, StartError
ray.init(address="local", include_dashboard=False, runtime_env={{"env_vars": {{"PYTHONPATH": sys.argv[1]}}}})
try:
    Pipeline.from_config({str(CONFIG)!r}, "fused=true")
except StartError as error:
    print("refused:", error)
"""


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *command], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Give a folder with another version of the package."""
    shutil.copytree(PACKAGE, tmp_path / "disagg_ray", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "disagg_ray" / "text.py").open("a") as file:
        file.write("# another version\n")
    return tmp_path


@pytest.mark.proof
def test_working_folder_shadows_nothing(other: Path) -> None:
    for name in ("numpy", "torch", "ray"):
        (other / f"{name}.py").write_text("raise ImportError('shadowed')\n")
    done = run(other, "-m", "disagg_ray.cli", *GENERATE, *SMALL, "--output", str(other / "out.mp4"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (other / "out.mp4").stat().st_size > 0


@pytest.mark.proof
def test_replica_of_another_version_fails_the_start_and_both_are_named(other: Path) -> None:
    done = run(other, "-c", OTHER_CODE, str(other))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert "runs other code than the driver: disagg_ray " in line
    assert f"in {other / 'disagg_ray'}, and {software().digest} in {PACKAGE};" in line


def test_other_libraries_are_named_and_what_they_are_built_for_does_not_count() -> None:
    ours = software()
    check_same("encoder-0", ours)
    assert "+" not in dict(ours.versions)["torch"]
    versions = dict(ours.versions) | {"torch": "1.0"}
    theirs = Software("/other", ours.digest, tuple(versions.items()))
    with pytest.raises(StartError, match=r"encoder-0 has other versions than the driver: torch 1\.0 \(here 2"):
        check_same("encoder-0", theirs)

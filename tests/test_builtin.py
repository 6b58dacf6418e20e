"""Configurations that come with the package, from any folder, in the repository and installed from the wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import imageio.v3 as iio
import pytest
import yaml

from disagg_ray import ConfigError, cli, load_config
from disagg_ray.config.builtin import list_builtin

ROOT = Path(__file__).parent.parent
PROMPT = ["--prompt", "a red circle moves left", "--num-frames", "9", "--num-inference-steps", "4"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_means_the_file_of_the_repository(elsewhere: Path) -> None:
    files = sorted((ROOT / "conf").glob("*.yaml"))
    assert list(list_builtin()) == [path.stem for path in files]
    assert load_config("builtin:tiny_i2v", "speed=fast") == load_config(ROOT / "conf" / "tiny_i2v.yaml", "speed=fast")


def test_a_file_builds_on_one_of_the_package(elsewhere: Path) -> None:
    Path("mine.yaml").write_text("base: builtin:tiny_t2v\ndefaults: {fps: 5}\n")
    config = load_config("mine.yaml")
    assert (config.model.path, config.defaults.fps) == ("builtin:tiny-wan-t2v", 5)


def test_an_unknown_name_is_refused_with_the_nearest(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration 'tiny_t2' comes with the package; did you mean tiny_t2v"):
        load_config("builtin:tiny_t2")
    with pytest.raises(ConfigError, match="`disagg-ray config --list` names them"):
        load_config("builtin:../../etc/passwd")


@pytest.mark.parametrize("name", ["generate", "up", "serve", "config", "doctor", "profile", "plan"])
def test_every_command_knows_them(name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"generate": [*PROMPT, "--output", "x.mp4"], "up": ["wan"], "profile": ["--output", "p.json"],
                 "plan": ["--profile", "p.json", "--gpus", "1xH200"]}  # fmt: skip
    assert cli.main([name, *arguments.get(name, []), "--config", "builtin:tiny_t3v"]) == 2
    assert "did you mean tiny_t2v?" in capsys.readouterr().err


def test_the_list_names_each_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"builtin:{name}" for name in list_builtin()]
    assert any(line.startswith("builtin:ltx2 ") and line.endswith(" or without, LTX-2.") for line in lines)
    assert {line[33:35].partition(" ")[0] for line in lines} == {""}, "the texts are not in one column"


@pytest.mark.slow
def test_a_video_is_made_in_any_folder(elsewhere: Path) -> None:
    assert cli.main(["generate", "--config", "builtin:tiny_t2v", "--local", *PROMPT, "--output", "out.mp4"]) == 0
    assert len(iio.imread("out.mp4", plugin="FFMPEG")) == 9


def install_wheel(folder: Path) -> Path:
    """Build the wheel, install it into an empty environment that finds this one's libraries, and give its bin/."""
    sources = folder / "sources"
    shutil.copytree(ROOT / "disagg_ray", sources / "disagg_ray", symlinks=True)
    shutil.copytree(ROOT / "conf", sources / "conf")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, sources]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    shutil.rmtree(sources)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "venv" / "lib").glob("*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    return python.parent


@pytest.mark.proof
@pytest.mark.parametrize("how", [["--local"], []], ids=["local", "ray"])
def test_the_wheel_makes_a_video_outside_the_repository(how: list[str], tmp_path: Path) -> None:
    programs = install_wheel(tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "RAY_ADDRESS"}}

    def disagg_ray(*arguments: str) -> str:
        command = [programs / "disagg-ray", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout

    assert len(disagg_ray("config", "--list").splitlines()) == len(list_builtin())
    assert yaml.safe_load(disagg_ray("config", "--config", "builtin:tiny_t2v"))["model"]["task"] == "t2v"
    where = subprocess.run([programs / "python", "-c", "import disagg_ray; print(disagg_ray.__file__)"], cwd=folder,
                           env=environment, check=True, capture_output=True, text=True).stdout  # fmt: skip
    assert where.startswith(str(tmp_path))
    disagg_ray("generate", "--config", "builtin:tiny_t2v", *PROMPT, *how, "--output", "out.mp4")
    assert len(iio.imread(folder / "out.mp4", plugin="FFMPEG")) == 9

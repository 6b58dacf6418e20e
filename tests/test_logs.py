"""What names and files hold reaches a terminal as text, in log lines as in errors."""

import json
import logging
from pathlib import Path

import pytest

from disagg_ray import cli
from disagg_ray.cli import logs

EVIL = "\x1b]0;x\x07\n\u202efake: done\x9b2J\udcff"


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_log_line_stays_one_line(kind: logs.Format, capsys: pytest.CaptureFixture[str]) -> None:
    before, level = logging.root.handlers[:], logging.root.level
    try:
        logs.set_up(kind)
        logging.getLogger("disagg_ray").warning("%s: bad", EVIL)
    finally:
        logging.root.handlers[:] = before
        logging.root.setLevel(level)
        logging.getLogger("disagg_ray").setLevel(logging.NOTSET)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    text = line if kind == "text" else json.loads(line)["message"]
    assert text == "\\x1b]0;x\\x07\\n\\u202efake: done\\x9b2J\\udcff: bad"


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "--config", f"{EVIL}.yaml"], ["config", "--config", "conf/tiny_t2v.yaml", f"{EVIL}=1"],
        ["config", "--config", "conf/tiny_t2v.yaml", f"stages.{EVIL}.replicas=2"], ["config", f"--{EVIL}"],
        ["generate", "--config", "conf/tiny_t2v.yaml", "--prompt", "x", "--output", f"{EVIL}.avi"],
        ["up", EVIL, "--config", "conf/tiny_t2v.yaml"], ["scale", "wan", f"{EVIL}=2x"], ["report", EVIL],
    ],
)  # fmt: skip
def test_an_error_stays_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()

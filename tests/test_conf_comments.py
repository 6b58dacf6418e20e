"""What the files in conf/ say in comments to write for more or smaller GPUs is accepted, and asks for that many."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from disagg_ray.config.load import load_config
from disagg_ray.driver.cluster import total_resources

CONF = Path(__file__).parent.parent / "conf"
SAID = re.compile(r"^#   (\d+)([^:]*): (.+)$", re.MULTILINE)
"""GPUs, for what or of what size, and overrides as a shell takes them."""
LARGE = [path.name for path in sorted(CONF.glob("wan*14b*.yaml")) if "vace" not in path.name]
"""But for a task that has no ranks that share tokens."""


@pytest.mark.parametrize("name", LARGE)
def test_each_commented_override_is_of_that_many_gpus(name: str) -> None:
    said = SAID.findall((CONF / name).read_text())
    assert {label.partition(" ")[0] or number for number, label, _ in said} >= {"2", "4", "8"}
    for number, label, overrides in said:
        config = load_config(CONF / name, *shlex.split(overrides))
        stage = config.stages["decoder" if "decode" in label else "transformer"]
        assert stage.parallel.size == int(number)
        assert stage.parallel.shard_weights == ("GB" in label)
        assert total_resources(config.stages)["GPU"] == pytest.approx(int(number) + 1, abs=0.41)

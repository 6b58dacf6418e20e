"""What docs/architecture.md names exists."""

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
STEPS = sorted(set(re.findall(r"`([\w.]+:[\w.]+)`", PAGE)))


def test_the_page_has_steps() -> None:
    assert len(STEPS) > 30


@pytest.mark.parametrize("step", STEPS)
def test_each_step_exists(step: str) -> None:
    module, _, path = step.partition(":")
    assert callable(reduce(getattr, path.split("."), import_module(f"disagg_ray.{module}")))


def test_every_room_is_named() -> None:
    rooms = {path.parent.name for path in (ROOT / "disagg_ray").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"`(\w+)`", PAGE))

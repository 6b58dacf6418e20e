"""The dashboard without a Grafana: its fields, the places of its panels, and the grammar of its expressions."""

import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from schemas import errors
from test_metrics import dashboard, dashboard_expressions

SCHEMA = Path(__file__).with_name("grafana.yaml")
PANELS = dashboard()["panels"]
PROMTOOL = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))


def test_dashboard_has_only_fields_that_grafana_knows() -> None:
    assert errors(SCHEMA, "dashboard", dashboard()) == []


@pytest.mark.parametrize("index", [0, 1, len(PANELS) - 1])
def test_a_misspelt_field_of_a_panel_is_found(index: int) -> None:
    wrong = dashboard()
    wrong["panels"][index]["gridpos"] = wrong["panels"][index].pop("gridPos")
    assert any("gridpos" in error for error in errors(SCHEMA, "dashboard", wrong))


def test_panels_have_names_of_their_own_and_do_not_lie_over_each_other() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, two in combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
    for panel in PANELS:
        targets = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(targets)) == len(targets)
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: `.ci/setup test`, or the package prometheus, has it")
def test_every_expression_is_promql(tmp_path: Path) -> None:
    def check(expressions: list[str]) -> int:
        records = [{"record": f"dashboard:{index}", "expr": each} for index, each in enumerate(expressions)]
        file = tmp_path / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": records}]}))
        return subprocess.run([str(PROMTOOL), "check", "rules", "--lint=none", file], check=False).returncode

    assert check(dashboard_expressions()) == 0
    assert check(["sum by (stage (up)"]) != 0

"""What a person, or a program, reads of the checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disagg_ray.doctor.check import Check, exit_status

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


MOST_NODES = 3


def print_checks(checks: Sequence[Check]) -> None:
    """Print a line a check, one for all nodes where it is the same; below those that are not well, what to do."""
    nodes = {check.node for check in checks if check.node}
    nodes_of: dict[Check, list[str]] = {}
    for check in checks:
        nodes_of.setdefault(replace(check, node=""), []).append(check.node)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=len(nodes) < 2)
    if len(nodes) > 1:
        table.add_column("node", overflow="fold")
    table.add_column("found", overflow="fold")
    for check, on in nodes_of.items():
        found = Text(check.detail)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        cells = [Text(check.status, style=STYLES[check.status]), Text(check.name), Text(_listed(on)), found]
        table.add_row(*(cells if len(nodes) > 1 else [*cells[:2], found]))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no width of its own
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in STYLES}
    console.print(", ".join(f"{number} {status}" for status, number in counts.items() if number), highlight=False)


def _listed(nodes: Sequence[str]) -> str:
    more = len(nodes) - MOST_NODES
    return ", ".join(nodes[:MOST_NODES]) + (f" and {more} more" if more > 0 else "")


def to_json(checks: Sequence[Check]) -> str:
    """Return the exit status and all checks as JSON."""
    return json.dumps({"status": exit_status(checks), "checks": [asdict(check) for check in checks]}, indent=2)

"""What a person, or a program, reads of the checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disagg_ray.doctor.check import Check, exit_status

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def print_checks(checks: Sequence[Check]) -> None:
    """Print a line a check; below those that are not well, what to do."""
    nodes = {check.node for check in checks if check.node}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=len(nodes) < 2)
    if len(nodes) > 1:
        table.add_column("node", overflow="fold")
    table.add_column("found", overflow="fold")
    for check in checks:
        found = Text(check.detail)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        cells = [Text(check.status, style=STYLES[check.status]), Text(check.name), Text(check.node), found]
        table.add_row(*(cells if len(nodes) > 1 else [*cells[:2], found]))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no width of its own
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in STYLES}
    console.print(", ".join(f"{number} {status}" for status, number in counts.items() if number), highlight=False)


def to_json(checks: Sequence[Check]) -> str:
    """Return the exit status and all checks as JSON."""
    return json.dumps({"status": exit_status(checks), "checks": [asdict(check) for check in checks]}, indent=2)

"""Prints checks for people, and writes them as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disagg_ray.doctor.check import Check, exit_status

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
MAX_NODES = 3
"""Nodes named on one line."""


def print_checks(checks: Sequence[Check]) -> None:
    """Print a line for each check, equal ones of several nodes as one, with its remedy below."""
    many = len({check.node for check in checks if check.node}) > 1
    nodes_of: dict[Check, list[str]] = {}
    for check in checks:
        nodes_of.setdefault(replace(check, node=""), []).append(check.node)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=not many)
    if many:
        table.add_column("node", overflow="fold")
    table.add_column("found", overflow="fold")
    for check, nodes in nodes_of.items():
        found = Text(check.detail)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        more = len(nodes) - MAX_NODES
        named = ", ".join(nodes[:MAX_NODES]) + (f" and {more} more" if more > 0 else "")
        status = Text(check.status, style=STYLES[check.status])
        table.add_row(status, Text(check.name), *([Text(named)] if many else []), found)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no width
    console.print(table)
    counts = Counter[str](check.status for check in checks)
    console.print(", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status]), highlight=False)


def to_json(checks: Sequence[Check]) -> str:
    """Return the exit status and all checks as JSON."""
    return json.dumps({"status": exit_status(checks), "checks": [asdict(check) for check in checks]}, indent=2)

"""Errors and tables of `bench.py stage`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Row = dict[str, Any]


def relative(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made.double() - expected.double()).norm() / expected.double().norm())


def psnr(made: torch.Tensor, expected: torch.Tensor, peak: float | None = None) -> float | None:
    """Return decibels; None: no difference at all."""
    error = float((made.double() - expected.double()).square().mean())
    peak = peak or float(expected.max() - expected.min())
    return None if error == 0 else float(10 * torch.log10(torch.tensor(peak**2 / error)))


def line(row: Row) -> str:
    shown = [f"{key} {value:.4g}" for key, value in flat(row) if isinstance(value, float)]
    return f"{row['kind']:9} {row['case']:42} " + (row.get("error") or ", ".join(shown))


def flat(row: Row) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, list):
            for entry in value:
                yield from ((f"{inner}@{entry['steps']}", v) for inner, v in entry.items())
        else:
            yield key, value


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table: seconds, their ratio to stock's of the same case, and errors."""
    columns = (
        "ready_s",
        "stage_s",
        "stock_s",
        "of_stock",
        "relative_l2",
        "latents_psnr_db",
        "frames_psnr_db",
        "peak_gb",
    )
    lines = ["| case | " + " | ".join(columns) + " | |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        for errors in row.get("errors") or [{}]:
            values = row | errors
            cells = [f"{values[c]:.4g}" if isinstance(values.get(c), float) else "" for c in columns]
            note = row.get("error") or (f"{errors['steps']} steps" if errors else "")
            lines.append(f"| {row['kind']}: {row['case']} | " + " | ".join(cells) + f" | {note} |")
    return "\n".join(lines)

"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    name: str
    node: str
    """Where it was made; empty: it is about the whole cluster or configuration."""
    status: Status
    detail: str
    remedy: str
    """What to type or do; never empty for a warning or failure, always for the others."""

    def __post_init__(self) -> None:
        assert bool(self.remedy) == (self.status in ("warn", "fail")), self


def ok(name: str, detail: str) -> Check:
    return Check(name, "", "ok", detail, "")


def skipped(name: str, detail: str) -> Check:
    return Check(name, "", "skipped", detail, "")


def warn(name: str, detail: str, remedy: str) -> Check:
    return Check(name, "", "warn", detail, remedy)


def fail(name: str, detail: str, remedy: str) -> Check:
    return Check(name, "", "fail", detail, remedy)


def warn_unless(good: bool, name: str, detail: str, remedy: str) -> Check:
    return ok(name, detail) if good else warn(name, detail, remedy)


def fail_unless(good: bool, name: str, detail: str, remedy: str) -> Check:
    return ok(name, detail) if good else fail(name, detail, remedy)


def at(node: str, checks: Iterable[Check]) -> Iterator[Check]:
    """Set the node of checks."""
    return (replace(check, node=node) for check in checks)


def exit_status(checks: Sequence[Check]) -> int:
    """Return 1 if a check failed; a warning is not a failure."""
    return int(any(check.status == "fail" for check in checks))

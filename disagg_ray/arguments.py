"""What the commands share: reading arguments, and leaving when told to."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from disagg_ray.errors import InputError

EPILOG = "KEY=VALUE overrides the configuration, as stages.transformer.replicas=2; `disagg-ray config` prints all keys."


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as everything else is reported: in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def terminated() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that every `with` closes what it holds."""

    def leave(signum: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

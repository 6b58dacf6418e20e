"""Argument parsers that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from disagg_ray.config.speed import SPEEDS
from disagg_ray.errors import InputError

CONFIG = "YAML file of the model and its deployment, or builtin:NAME (`disagg-ray config --list`)"
EPILOG = "KEY=VALUE overrides the configuration, as stages.transformer.replicas=2; `disagg-ray config` prints all keys."


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as any invalid input, in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def config_parser(name: str, command: Callable[..., int], *, required: bool = False) -> Parser:
    """Return the parser of a command that takes a configuration and overrides of it."""
    parser = Parser(prog=f"disagg-ray {name}", description=command.__doc__, epilog=EPILOG)
    parser.add_argument("--config", required=required, help=CONFIG)
    add_overrides(parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add configuration overrides, and `--speed` as one of them."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides, anywhere")
    parser.add_argument("--speed", choices=SPEEDS, help="exact frames (the default), fast, or in the smallest memory")


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Return all overrides of a command, those of flags last."""
    return [*options.overrides, *([f"speed={options.speed}"] if options.speed else [])]

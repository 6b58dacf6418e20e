"""Argument parsers that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from disagg_ray.config.speed import SPEEDS
from disagg_ray.errors import InputError
from disagg_ray.text import did_you_mean

CONFIG = "YAML file of the model and its deployment, or builtin:NAME (`disagg-ray config --list`)"
NUMBERS = {int: "whole number", float: "number"}
EPILOG = "KEY=VALUE overrides the configuration, as stages.transformer.replicas=2; `disagg-ray config` prints all keys."


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as any invalid input, in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", int, partial(_number, int))
        self.register("type", float, partial(_number, float))

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        raise InputError(message if unknown == message else message + self._nearest(unknown))

    def _nearest(self, unknown: str) -> str:
        """Return the end of a message about unknown flags: the flag that ends as the first, or is most similar."""
        word, known = unknown.split(maxsplit=1)[0].partition("=")[0], self._option_string_actions
        ends = next((flag for flag in known if flag.endswith(word[1:])), None)
        near = f"; did you mean {ends}?" if ends else did_you_mean(word, known, 0.7)
        return near or f"; `{self.prog} --help` lists the flags"


def _number(kind: type[int] | type[float], text: str) -> int | float:
    """Return the value of a flag that takes one number."""
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not one {NUMBERS[kind]}") from error


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

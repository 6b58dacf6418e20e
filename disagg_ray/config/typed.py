"""From trees of text to the dataclasses of the schema: a field's type says what the text of its value means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any, NoReturn

from disagg_ray.config.rules import Kind, kind_of, kinds
from disagg_ray.config.tree import Tree
from disagg_ray.errors import ConfigError
from disagg_ray.text import nearest, printable

Layer = dict[str, Any]
"""A section's keys, each with a `Tree` or, where it is a section itself, a `Layer`."""
MISSING = "???"
"""The default of a field that must be given."""
INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,99}")
DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]{1,9})?")
NOT_FINITE = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
"""YAML 1.2's numbers, and 1_000."""
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WORD = re.compile(r"\w{1,40}")
FREE_TEXT = ("defaults.negative_prompt",)
"""Keys whose text may hold `${`: it means nothing there."""
EXACT = 2**53
"""Up to it, a float holds every whole number exactly."""


def is_text(kind: Kind | None) -> bool:
    """Return whether a value may be text."""
    return kind is not None and kind.type in (str, int | str)


def known_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a schema; `*` is a name of the user's choice, `[*]` a place in a list."""
    kind = kind if isinstance(kind, Kind) else kind_of(kind)
    if kind.is_section:
        for name, child in kinds(kind.type).items():
            yield prefix + name
            yield from known_keys(child, f"{prefix}{name}.")
    elif kind.item is not None:
        yield from known_keys(kind.item, f"{prefix}*." if kind.is_mapping else f"{prefix[:-1]}[*].")


def build(section: type, given: Layer) -> Any:
    """Return what the merged layers say, as a dataclass.

    Raises:
        ConfigError: names the key, what was written there, and what may be.
    """
    try:
        return _build(kind_of(section), given, "")
    except _UnknownKey as error:
        raise ConfigError(_explain(error.key, error.place, list(known_keys(section)))) from None


class _UnknownKey(Exception):
    def __init__(self, key: str, place: str) -> None:
        self.key, self.place = key, place


def _explain(key: str, place: str, known: Sequence[str]) -> str:
    """Suggest the nearest key, by the whole of it or else by its last word."""
    parts = key.split(".")
    named = [".".join(_name(*pair) for pair in zip_longest(name.split("."), parts) if pair[0]) for name in known]
    leaves = {name.rpartition(".")[2]: name for name in named}
    leaf = nearest(parts[-1], leaves)
    near = nearest(key, named) or (leaf and leaves[leaf])
    hint = f"did you mean {printable(near)}?" if near else "`disagg-ray config` prints them all"
    if place and not WORD.fullmatch(parts[-1]):  # perhaps no configuration at all: its lines must not be shown
        return f"config: {place} holds no key of a configuration; {hint}"
    return f"{printable(key)}: no such key{place and f' ({place})'}; {hint}"


def _name(pattern: str, given: str | None) -> str:
    """Put the name or the place that was given where a known key has a star."""
    stem = pattern.removesuffix("*").removesuffix("[*]")
    return given if given is not None and "*" in pattern and given.startswith(stem) else pattern


def _build(kind: Kind, given: Layer | Tree, key: str) -> Any:
    if kind.is_section:
        return _build_section(kind, given, key)
    if kind.is_mapping and isinstance(given, dict):
        assert kind.item is not None
        return {name: _build(kind.item, child, f"{key}.{name}") for name, child in given.items()}
    assert isinstance(given, Tree)
    if kind.optional and given.is_null:
        return None
    if kind.is_mapping:
        if not isinstance(given.value, dict):
            refuse(key, given, "must be keys and values")
        return _build(kind, given.value, key)
    if kind.item is not None:
        if not isinstance(given.value, list):
            refuse(key, given, "must be a list, as [a, b]")
        return [_build(kind.item, child, f"{key}[{index}]") for index, child in enumerate(given.value)]
    if not isinstance(given.value, str):
        refuse(key, given, "must be text; put it in quotes" if is_text(kind) else "must be one value")
    if "${" in given.value and key not in FREE_TEXT:
        refuse(key, given, "holds ${...}, which is not replaced by anything; write the value itself")
    return _READERS[kind.type](key, given, given.value)


def refuse(key: str, tree: Tree, remedy: str) -> NoReturn:
    """Raise what is wrong with a key's value."""
    place = f" ({tree.place})" if tree.place else ""
    raise ConfigError(f"invalid {printable(key)}={tree}: {remedy}{place}")


def _build_section(kind: Kind, given: Layer | Tree, key: str) -> Any:
    hints = kinds(kind.type)
    if isinstance(given, Tree):
        if not isinstance(given.value, dict):
            refuse(key, given, f"must be keys and values, as {{{next(iter(hints))}: ...}}")
        given = given.value
    prefix = f"{key}." if key else ""
    values = {}
    for name, child in given.items():
        if name not in hints:
            raise _UnknownKey(f"{prefix}{name}", child.place)
        values[name] = _build(hints[name], child, f"{prefix}{name}")
    for f in fields(kind.type):
        if f.name not in values and hints[f.name].is_section:
            values[f.name] = _build(hints[f.name], {}, f"{prefix}{f.name}")
        if f.default == MISSING and f.name not in values:
            raise ConfigError(f"{prefix}{f.name}: not given; write it in the file or as {prefix}{f.name}=VALUE")
    return kind.type(**values)


def _read_text(key: str, tree: Tree, text: str) -> str:
    if tree.is_null and text:
        refuse(key, tree, 'must be text; write "" for none')
    return text


def _read_bool(key: str, tree: Tree, text: str) -> bool:
    if text.lower() not in WORDS:
        refuse(key, tree, "must be true or false")
    return WORDS[text.lower()]


def _read_int(key: str, tree: Tree, text: str) -> int:
    number = _number(text)
    if number is None or not (isinstance(number, int) or (number.is_integer() and abs(number) <= EXACT)):
        refuse(key, tree, "must be a whole number")
    return int(number)


def _read_float(key: str, tree: Tree, text: str) -> float:
    number = _number(text)
    if number is None:
        refuse(key, tree, "must be a number")
    return float(number)


def _number(text: str) -> int | float | None:
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else NOT_FINITE.get(text.lower())


def _read_int_or_text(_: str, __: Tree, text: str) -> int | str:
    return int(text) if INTEGER.fullmatch(text) else text


_READERS: dict[Any, Callable[[str, Tree, str], Any]] = {
    str: _read_text,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    int | str: _read_int_or_text,
}

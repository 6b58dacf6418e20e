"""From trees of text to the dataclasses of the schema: a field's type says what the text of its value means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, NoReturn

from disagg_ray.config.rules import Kind, kind_of, kinds
from disagg_ray.config.schema import Config
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
MUST = {
    str: 'must be text; write "" for none',
    bool: "must be true or false",
    int: "must be a whole number",
    float: "must be a number",
}
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


def build(given: Layer) -> Config:
    """Return what the merged layers say.

    Raises:
        ConfigError: names the key, what was written there, and what may be.
    """
    config = _build(kind_of(Config), given, "")
    assert isinstance(config, Config)
    return config


def _build(kind: Kind, given: Layer | Tree, key: str) -> Any:
    if kind.is_section:
        is_null = kind.optional and isinstance(given, Tree) and given.is_null
        return None if is_null else _build_section(kind, given, key)
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
    value = _read(kind, given, given.value)
    if value is None:
        refuse(key, given, MUST[kind.type])
    return value


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
            _refuse_key(prefix, name, hints, child.place)
        values[name] = _build(hints[name], child, f"{prefix}{name}")
    for f in fields(kind.type):
        if f.name not in values and hints[f.name].is_section and not hints[f.name].optional:
            values[f.name] = _build(hints[f.name], {}, f"{prefix}{f.name}")
        if f.default == MISSING and f.name not in values:
            raise ConfigError(f"{prefix}{f.name}: not given; write it in the file or as {prefix}{f.name}=VALUE")
    return kind.type(**values)


def _refuse_key(prefix: str, name: str, known: Iterable[str], place: str) -> NoReturn:
    """Raise what is wrong with a key that does not exist; suggest the nearest of its section, or else of all."""
    near = nearest(name, known)
    leaves = {key.rpartition(".")[2]: key for key in reversed(list(known_keys(Config)))}
    suggested = f"{prefix}{near}" if near else leaves.get(nearest(name, leaves) or "")
    hint = f"did you mean {printable(suggested)}?" if suggested else "`disagg-ray config` prints them all"
    if place and not WORD.fullmatch(name):  # perhaps no configuration at all: its lines must not be shown
        raise ConfigError(f"config: {place} holds no key of a configuration; {hint}")
    raise ConfigError(f"{printable(prefix + name)}: no such key{place and f' ({place})'}; {hint}")


def _read(kind: Kind, tree: Tree, text: str) -> Any:
    """Return the value that text has for a type; None: it has none."""
    if kind.type is str:
        return None if tree.is_null and text else text
    if kind.type is bool:
        return WORDS.get(text.lower())
    number: int | float | None
    if INTEGER.fullmatch(text):
        number = int(text)
    else:
        number = float(text) if DECIMAL.fullmatch(text) else NOT_FINITE.get(text.lower())
    if kind.type is float:
        return None if number is None else float(number)
    if isinstance(number, float) and kind.type is int:
        return int(number) if number.is_integer() and abs(number) <= EXACT else None
    return text if kind.type is not int and not isinstance(number, int) else number

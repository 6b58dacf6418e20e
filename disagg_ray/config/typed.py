"""From trees of text to the dataclasses of the schema: a field's type says what the text of its value means."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from disagg_ray.config.tree import Tree
from disagg_ray.errors import ConfigError
from disagg_ray.text import nearest, printable

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
"""Up to it, every whole number is a float of its own."""


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, by name."""
    return get_type_hints(kind)


def child_type(kind: Any, key: str) -> Any:
    """Return the type of what stands below a key; None: there is no such key."""
    kind, _ = _split_null(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return field_types(kind).get(key)
    return get_args(kind)[1] if get_origin(kind) is dict else None


def is_mapping(kind: Any) -> bool:
    """Return whether keys of the user's choice stand there, with values that are no sections."""
    kind, _ = _split_null(kind)
    return get_origin(kind) is dict and not is_dataclass(get_args(kind)[1])


def is_section(kind: Any) -> bool:
    """Return whether keys stand there, the schema's or of the user's choice."""
    kind, _ = _split_null(kind)
    return is_dataclass(kind) or get_origin(kind) is dict


def is_text(kind: Any) -> bool:
    kind, _ = _split_null(kind)
    return kind is str or (str in get_args(kind) and get_origin(kind) in (Union, types.UnionType))


def known_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a schema; a name of the user's choice stands as `*`, a place in a list as `[*]`."""
    kind, _ = _split_null(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        for name, hint in field_types(kind).items():
            yield prefix + name
            yield from known_keys(hint, f"{prefix}{name}.")
    elif get_origin(kind) is dict:
        yield from known_keys(get_args(kind)[1], f"{prefix}*.")
    elif get_origin(kind) is list:
        yield from known_keys(get_args(kind)[0], f"{prefix[:-1]}[*].")


def build(kind: Any, tree: Tree) -> Any:
    """Return what a tree says, as a value of a type.

    Raises:
        ConfigError: names the key, what was written there, and what may be.
    """
    try:
        return _build(kind, tree, "")
    except _UnknownKey as error:
        raise ConfigError(_explain(error.key, error.tree, list(known_keys(kind)))) from None


class _UnknownKey(Exception):
    def __init__(self, key: str, tree: Tree) -> None:
        self.key, self.tree = key, tree


def _explain(key: str, tree: Tree, known: Sequence[str]) -> str:
    """Name the nearest key, by the whole of it or else by its last word."""
    parts = key.split(".")
    named = [".".join(_name(*pair) for pair in zip_longest(name.split("."), parts) if pair[0]) for name in known]
    leaves = {name.rpartition(".")[2]: name for name in named}
    leaf = nearest(parts[-1], leaves)
    near = nearest(key, named) or (leaf and leaves[leaf])
    place = f" ({tree.place})" if tree.place else ""
    hint = f"did you mean {printable(near)}?" if near else "`disagg-ray config` prints them all"
    if tree.place and not WORD.fullmatch(
        parts[-1]
    ):  # perhaps no configuration at all: its lines are not for us to show
        return f"config: {tree.place} holds no key of a configuration; {hint}"
    return f"{printable(key)}: no such key{place}; {hint}"


def _name(pattern: str, given: str | None) -> str:
    """Put the name or the place that was given where a known key has a star."""
    stem = pattern.removesuffix("*").removesuffix("[*]")
    return given if given is not None and "*" in pattern and given.startswith(stem) else pattern


def _build(kind: Any, tree: Tree, key: str) -> Any:
    kind, may_be_null = _split_null(kind)
    if may_be_null and tree.is_null:
        return None
    if is_dataclass(kind):
        return _build_section(kind, tree, key)
    if get_origin(kind) is dict:
        if not isinstance(tree.value, dict):
            refuse(key, tree, "must be keys and values")
        prefix = f"{key}." if key else ""
        return {name: _build(get_args(kind)[1], child, f"{prefix}{name}") for name, child in tree.value.items()}
    if get_origin(kind) is list:
        if not isinstance(tree.value, list):
            refuse(key, tree, "must be a list, as [a, b]")
        return [_build(get_args(kind)[0], child, f"{key}[{index}]") for index, child in enumerate(tree.value)]
    if not isinstance(tree.value, str):
        refuse(key, tree, "must be text; put it in quotes" if is_text(kind) else "must be one value")
    if "${" in tree.value and key not in FREE_TEXT:
        refuse(key, tree, "holds ${...}, which is not replaced by anything; write the value itself")
    return _READERS.get(kind, _read_number_or_text)(key, tree)


def refuse(key: str, tree: Tree, remedy: str) -> NoReturn:
    """Raise what is wrong with a key's value."""
    place = f" ({tree.place})" if tree.place else ""
    raise ConfigError(f"invalid {printable(key)}={tree}: {remedy}{place}")


def _split_null(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether None was one of its members."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    if type(None) not in members:
        return kind, False
    left = tuple(member for member in members if member is not type(None))
    return (left[0] if len(left) == 1 else Union[left]), True  # noqa: UP007 - the members are only known here


def _build_section(kind: Any, tree: Tree, key: str) -> Any:
    hints = field_types(kind)
    entries = {} if tree.is_empty else tree.value
    if not isinstance(entries, dict):
        refuse(key or "configuration", tree, f"must be keys and values, as {{{next(iter(hints))}: ...}}")
    prefix = f"{key}." if key else ""
    given = {}
    for name, child in entries.items():
        if name not in hints:
            raise _UnknownKey(f"{prefix}{name}", child)
        given[name] = _build(hints[name], child, f"{prefix}{name}")
    for f in fields(kind):
        if f.name not in given and is_dataclass(hints[f.name]):
            given[f.name] = _build(hints[f.name], Tree({}), f"{prefix}{f.name}")
        if f.default == MISSING and f.name not in given:
            raise ConfigError(f"{prefix}{f.name}: not given; write it in the file or as {prefix}{f.name}=VALUE")
    return kind(**given)


def _read_text(key: str, tree: Tree) -> str:
    assert isinstance(tree.value, str)
    if tree.is_null and tree.value:
        refuse(key, tree, 'must be text; write "" for none')
    return tree.value


def _read_bool(key: str, tree: Tree) -> bool:
    assert isinstance(tree.value, str)
    if tree.value.lower() not in WORDS:
        refuse(key, tree, "must be true or false")
    return WORDS[tree.value.lower()]


def _read_int(key: str, tree: Tree) -> int:
    number = _number(tree)
    if number is None or not (isinstance(number, int) or (number.is_integer() and abs(number) <= EXACT)):
        refuse(key, tree, "must be a whole number")
    return int(number)


def _read_float(key: str, tree: Tree) -> float:
    number = _number(tree)
    if number is None:
        refuse(key, tree, "must be a number")
    return float(number)


def _number(tree: Tree) -> int | float | None:
    assert isinstance(tree.value, str)
    if INTEGER.fullmatch(tree.value):
        return int(tree.value)
    return float(tree.value) if DECIMAL.fullmatch(tree.value) else NOT_FINITE.get(tree.value.lower())


def _read_number_or_text(_: str, tree: Tree) -> int | str:
    assert isinstance(tree.value, str)
    return int(tree.value) if INTEGER.fullmatch(tree.value) else tree.value


_READERS: dict[Any, Callable[[str, Tree], Any]] = {
    str: _read_text,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
}

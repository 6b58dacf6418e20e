"""YAML as it was written: mappings, lists and the text of scalars, each with its file and line.

The type of its field decides what a scalar means (`typed`): `no`, `0123` and `12e4` stay text where text belongs.
"""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]

from disagg_ray.errors import ConfigError
from disagg_ray.text import mask, printable

MOST_NODES = 100_000
"""Aliases count each time: a few lines of them could expand to billions."""
NULLS = ("", "~", "null", "Null", "NULL")


class Tree:
    """A value that was written somewhere; a plain class, which OmegaConf carries without looking into it."""

    def __init__(self, value: str | list[Tree] | dict[str, Tree], place: str = "", *, quoted: bool = False) -> None:
        self.value = value
        self.place = place
        """File and line; empty: an override."""
        self.quoted = quoted

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.value in NULLS

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows the key in a file."""
        return bool(self.place) and not self.quoted and self.value == ""

    def __str__(self) -> str:
        """Return it for a message: one line, in YAML's flow style."""
        return printable(mask(_flow(self)), 80)


def _flow(tree: Tree) -> str:
    if isinstance(tree.value, dict):
        return "{" + ", ".join(f"{key}: {_flow(value)}" for key, value in tree.value.items()) + "}"
    if isinstance(tree.value, list):
        return "[" + ", ".join(map(_flow, tree.value)) + "]"
    return repr(tree.value) if tree.quoted else tree.value


def to_tree(value: Any) -> Tree:
    """Return dictionaries, lists and scalars as if they had been written."""
    if isinstance(value, dict):
        return Tree({key: to_tree(each) for key, each in value.items()})
    return Tree([to_tree(each) for each in value] if isinstance(value, list) else str(value))


def parse(text: str, source: str, file: str = "") -> Tree:
    """Read YAML; `file` is its name, if it is a file. No message repeats the text: it may be any file.

    Raises:
        ConfigError: names the source, and the line and column of the fault.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(f"{source} is not YAML: {where}{_problem(error)}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{source} is not YAML: it holds a character that no text may hold") from error
    except RecursionError:
        raise ConfigError(f"{source} cannot be used: it is nested too deeply") from None
    if node is None:
        return Tree({}, _place(file, 0)) if file else Tree("")
    try:
        return _Reader(source, file).read(node)
    except RecursionError:
        raise ConfigError(f"{source} cannot be used: it is nested too deeply, or holds itself") from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong, without the words of the file that some messages end with."""
    problem = str(error.problem or error.context or "it cannot be parsed")
    if problem.startswith("expected"):  # names of tokens; a character of the file follows "but found" alone
        return problem.partition(", but found")[0]
    return re.split("['\"]", problem, maxsplit=1)[0].strip(" ,;")


def _place(file: str, line: int) -> str:
    return f"{printable(file)}, line {line + 1}" if file else ""


class _Reader:
    def __init__(self, source: str, file: str) -> None:
        self._source, self._file, self._num_nodes = source, file, 0

    def read(self, node: Any) -> Tree:
        self._num_nodes += 1
        if self._num_nodes > MOST_NODES:
            raise ConfigError(f"{self._source} cannot be used: it expands to over {MOST_NODES} values")
        line = node.start_mark.line
        place = _place(self._file, line)
        if isinstance(node, yaml.SequenceNode):
            return Tree([self.read(item) for item in node.value], place)
        if isinstance(node, yaml.MappingNode):
            return Tree(self._entries(node), place)
        text: str = node.value
        if "\0" in text:
            raise ConfigError(f"{self._source} cannot be used: a value on line {line + 1} holds a NUL character")
        return Tree(text, place, quoted=node.style is not None)

    def _entries(self, node: Any) -> dict[str, Tree]:
        entries: dict[str, Tree] = {}
        for key, value in node.value:
            where = f"{self._source} cannot be used: line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{where} holds a key that is no word")
            if key.value in entries:
                raise ConfigError(f"{where} holds a key that was given before")
            entries[key.value] = self.read(value)
        return entries

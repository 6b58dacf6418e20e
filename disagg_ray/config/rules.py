"""What a value must be: rules beside the fields of dataclasses, and the check that applies them.

A field's type carries the rules of its value, `replicas: Annotated[int, at_least(1)]`; rules between fields are in the
`rules` of their section.
"""

from __future__ import annotations

import math
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from numbers import Real
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from disagg_ray.errors import InputError
from disagg_ray.text import did_you_mean, printable, shown

Check = tuple[str, object, bool, str]
"""Key, value, whether it is valid, and what it must be."""


@dataclass(frozen=True)
class Rule:
    """A condition on a field's value; null, where the field may be null, is exempt."""

    holds: Callable[[Any], bool]
    remedy: str
    """What the value must be, as `must be at least 1`."""
    hint: Callable[[Any], str] = lambda _: ""
    """Returns the end of the message about an invalid value."""


def at_least(least: float) -> Rule:
    return Rule(lambda number: least <= number < math.inf, f"must be at least {least}")


def at_most(most: int) -> Rule:
    return Rule(lambda number: number <= most, f"must be at most {most}")


def between(least: float, most: float) -> Rule:
    return Rule(lambda number: least <= number <= most, f"must be from {least} to {most}")


def one_of(*words: str) -> Rule:
    remedy = f"must be one of {', '.join(words)}"
    return Rule(lambda word: word in words, remedy, lambda word: did_you_mean(word, words))


def nearest_in(step: int, offset: int) -> Callable[[int], str]:
    """Return a hint at the nearest positive number of the form `step * k + offset`."""
    least = offset or step
    return lambda number: f"; the nearest is {max(least, round((number - offset) / step) * step + offset)}"


Count = Annotated[int, at_least(1)]
MOST_BYTES = 2**60
Bytes = Annotated[int, Rule(lambda number: number > 0, "must be a positive number of bytes"), at_most(MOST_BYTES)]
MOST_S = 1_000_000
"""The longest timeout; the system's own waits take no more than 24 days."""
Positive = Annotated[float, Rule(lambda number: 0 < number < math.inf, "must be a positive number")]
FINITE = "must be a finite number of at least 0"
Guidance = Annotated[float, Rule(lambda scale: 0 <= scale <= sys.float_info.max, FINITE)]  # an int may be over it
Fps = Annotated[int, between(1, 240)]


def real(value: object) -> int | float | None:
    """Return a real number of any kind as Python's own; None: it is not one, or a bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        if not isinstance(value, Real):
            return None
    try:
        return float(value)
    except OverflowError:
        return None


def whole(value: object) -> int | None:
    """Return a whole number of any kind, 24.0 too, as Python's own; None: it is not one, or a bool."""
    number = real(value)
    return number if not isinstance(number, float) else int(number) if number.is_integer() else None


def side_check(key: str, side: int, multiple: int) -> Check:
    """Return the rule of a height or width for a model whose sides are multiples of a number."""
    ok, remedy = side > 0 and side % multiple == 0, f"must be a positive multiple of {multiple}"
    return key, side, ok, remedy + nearest_in(multiple, 0)(side)


def frames_check(key: str, frames: int, step: int | None) -> Check:
    """Return the rule of a number of frames for a model that makes `step` of each latent frame but the first.

    None: it makes one image.
    """
    if step is None:
        return key, frames, frames == 1, "must be 1: what this model makes is an image"
    return key, frames, frames > 0 and frames % step == 1, f"must be {step}k + 1" + nearest_in(step, 1)(frames)


@dataclass(frozen=True)
class Kind:
    """What a type hint says."""

    type: Any
    """Without null and without rules."""
    optional: bool = False
    """Whether the value may be null."""
    rules: tuple[Rule, ...] = ()
    item: Kind | None = None
    """The values of a mapping or list."""

    @property
    def is_section(self) -> bool:
        """Whether its keys are a dataclass's fields."""
        return is_dataclass(self.type)

    @property
    def is_mapping(self) -> bool:
        """Whether its keys are the user's choice."""
        return get_origin(self.type) is dict

    @property
    def is_free(self) -> bool:
        """Whether it is a mapping to values that are no sections."""
        return self.is_mapping and not (self.item and self.item.is_section)

    def child(self, key: str) -> Kind | None:
        """Return what a key of it holds; None: it has no such key."""
        if self.is_section:
            return kinds(self.type).get(key)
        return self.item if self.is_mapping else None


def kind_of(hint: Any) -> Kind:
    """Take `Annotated` and `| None` off a type hint, in whichever order they are nested."""
    optional, rules = False, ()
    while True:
        members = get_args(hint)
        if get_origin(hint) is Annotated:
            hint, rules = members[0], (*rules, *members[1:])
        elif get_origin(hint) in (Union, types.UnionType) and type(None) in members:
            hint, optional = Union[tuple(member for member in members if member is not type(None))], True  # noqa: UP007
        else:
            return Kind(hint, optional, rules, kind_of(members[-1]) if get_origin(hint) in (dict, list) else None)


@cache
def kinds(section: Any) -> dict[str, Kind]:
    """Return the kind of each field of a dataclass, by name."""
    return {name: kind_of(hint) for name, hint in get_type_hints(section, include_extras=True).items()}


class Section:
    """Base of dataclasses whose fields have rules."""

    def rules(self) -> Iterable[Check]:
        """Yield the rules between fields, by the names of those. Each may rely on what was checked before it."""
        return ()


def enforce(rules: Iterable[Check], error: type[InputError]) -> None:
    """Raise the first broken rule, as `invalid replicas=0: must be at least 1`."""
    for key, value, ok, remedy in rules:
        if not ok:
            raise error(f"invalid {printable(key)}={shown(value)}: {remedy}")


def checks(section: Any, prefix: str = "", null: str = " or null") -> Iterator[Check]:
    """Yield every rule of a section and of those inside it; `null` ends a remedy where null is valid too."""
    for name, kind in kinds(section.__class__).items():
        yield from _value_checks(kind, getattr(section, name), prefix + name, null)
    for name, value, ok, remedy in section.rules():
        yield prefix + name, value, ok, remedy


def _value_checks(kind: Kind, value: Any, key: str, null: str) -> Iterator[Check]:
    if value is None:
        return
    for rule in kind.rules:
        ok = rule.holds(value)
        yield key, value, ok, "" if ok else rule.remedy + null * kind.optional + rule.hint(value)
    if isinstance(value, Section):
        yield from checks(value, f"{key}.", null)
    elif kind.item is not None and isinstance(value, dict | list | tuple):  # of a request it may be anything
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in named:
            yield from _value_checks(kind.item, each, f"{key}.{name}" if kind.is_mapping else f"{key}[{name}]", null)

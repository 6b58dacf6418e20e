"""The families there are: each folder of `models` that says it is one."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from disagg_ray import models
from disagg_ray.models.family import Family
from disagg_ray.text import did_you_mean

DEFAULT = "wan"
"""The family of a configuration that names none."""


def _find() -> dict[str, Family]:
    packages = (import_module(f"{models.__name__}.{m.name}") for m in iter_modules(models.__path__) if m.ispkg)
    found = (getattr(package, "FAMILY", None) for package in packages)
    return {family.name: family for family in found if isinstance(family, Family)}


FAMILIES = _find()
"""By name."""


def family_of_pipeline(class_name: str) -> Family | None:
    """Return the family that equals a stock pipeline."""
    return next((family for family in FAMILIES.values() if class_name in family.pipelines), None)


def model_of(component: object) -> Any:
    """Return what runs the family (`models.model.Model`) whose component this is, by its class."""
    name = type(component).__name__
    return next(
        family.part("model").MODEL
        for family in FAMILIES.values()
        if any(name in known.classes for known in family.components.values())
    )


def find_shape(name: str) -> tuple[Family, Any]:
    """Return a shape of that name and its family.

    Raises:
        ValueError: no shape has this name; names the nearest.
    """
    known = {shape: family for family in FAMILIES.values() for shape in family.part("shapes").SHAPES}
    if name not in known:
        raise ValueError(f"no model shape {name!r}; known: {', '.join(known)}{did_you_mean(name, known, cutoff=0)}")
    return known[name], known[name].part("shapes").SHAPES[name]

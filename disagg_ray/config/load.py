"""From YAML files (`base:` names the file below) and dotted overrides to one configuration, and back."""

from __future__ import annotations

import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from disagg_ray.config.builtin import BUILTIN, find_file, list_builtin
from disagg_ray.config.fusing import fuse
from disagg_ray.config.rules import Kind
from disagg_ray.config.schema import Config
from disagg_ray.config.speed import preset_stages
from disagg_ray.config.tree import Tree, parse, to_tree
from disagg_ray.config.typed import Layer, build, is_text, refuse
from disagg_ray.environment import expand_home
from disagg_ray.errors import ConfigError
from disagg_ray.text import mask, nearest, printable, shown

SCHEMA = Kind(Config)
MOST_BYTES = 2**20
"""Limit of a file, far above the longest prompt."""


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file or `builtin:NAME`, its `base:` files and dotted overrides (`stages.transformer.replicas=2`).

    Raises:
        ConfigError: names the key, the value and the nearest right key.
    """
    merged: Layer = {}
    for layer in (*_layers(find_file(path)), *map(parse_override, overrides)):
        _read_stages(layer, _stages(merged))
        merged = _merge(merged, _sections(SCHEMA, layer))
    _check_groups(_stages(merged))
    config = build(merged)
    if stages := preset_stages(config):
        config = build(_merge(_sections(SCHEMA, to_tree({"stages": stages})), merged))
    folder = expand_home(config.model.path)
    if folder.is_dir():  # replicas have other working folders
        config = replace(config, model=replace(config.model, path=str(folder.absolute())))
    return fuse(config) if config.fused else config


def _merge(below: Layer, above: Layer) -> Layer:
    """Merge a layer into those below: sections key by key; all else is replaced."""
    layers = [OmegaConf.create(layer, flags={"allow_objects": True}) for layer in (below, above)]
    merged: Any = OmegaConf.to_container(OmegaConf.merge(*layers))
    return dict(merged)


def _sections(kind: Kind, tree: Tree) -> Layer:
    """Return a tree's sections as dictionaries, which are merged key by key, and all else as it was written.

    An empty section changes nothing; an empty mapping, `{}`, replaces the one below.
    """
    found: Layer = {}
    assert isinstance(tree.value, dict)
    for key, value in tree.value.items():
        child = kind.child(key)
        if child is None or not (child.is_section or child.is_mapping):
            found[key] = value
        elif isinstance(value.value, dict) and (value.value or not child.is_free):
            found[key] = _sections(child, value)
        else:
            found[key] = {} if value.is_empty else value
    return found


def _stages(merged: Layer) -> Layer:
    stages = merged.get("stages")
    return stages if isinstance(stages, dict) else {}


def _read_stages(layer: Tree, below: Layer) -> None:
    """Drop stages that a layer sets to null from those below, so that others can take their blocks; spread bounds."""
    assert isinstance(layer.value, dict)
    stages = layer.value.get("stages")
    given = stages.value if stages is not None and isinstance(stages.value, dict) else {}
    for name, stage in list(given.items()):
        if stage.is_empty:
            refuse(f"stages.{name}", stage, "must hold keys, or be null to leave the stage out")
        if stage.is_null:
            near = nearest(name, below)
            if name not in below and near is not None:
                refuse(f"stages.{name}", stage, f"there is no such stage; did you mean {near}?")
            below.pop(name, None)
            del given[name]
        elif isinstance(stage.value, dict):
            _spread_bounds(f"stages.{name}", stage.value)


def _spread_bounds(key: str, stage: dict[str, Tree]) -> None:
    """Read `replicas: {min, max}` as the least number to start with and the bounds; a plain number has none."""
    given = stage.get("replicas")
    if given is None:
        return
    if not isinstance(given.value, dict):
        stage.setdefault("min_replicas", Tree("null"))
        stage.setdefault("max_replicas", Tree("null"))
        return
    if set(given.value) != {"min", "max"}:
        refuse(f"{key}.replicas", given, "must be a number, or {min: A, max: B}")
    least, most = given.value["min"], given.value["max"]
    stage.update(replicas=least, min_replicas=least, max_replicas=most)


def _check_groups(stages: Layer) -> None:
    """Refuse a new group that is probably misspelt: it has no `replicas`, and its name is similar to another's."""
    for name, stage in stages.items():
        groups = stage.get("groups") if isinstance(stage, dict) else None
        groups = groups if isinstance(groups, dict) else {}
        for group, given in groups.items():
            near = nearest(group, groups.keys() - {group})
            if near is not None and isinstance(given, dict) and "replicas" not in given:
                key = printable(f"stages.{name}.groups.{group}")
                raise ConfigError(f"{key}: no such group; did you mean {printable(near)}? A new one needs replicas")


def _layers(path: Path) -> list[Tree]:
    """Return the file and those it builds on, lowest first."""
    layers: list[Tree] = []
    seen: set[Path] = set()
    following: Path | None = path
    while following is not None:
        layer = _read_yaml(following)  # first: `resolve` is not for every text
        if following.resolve() in seen:
            raise ConfigError(f"base: {shown(str(following), 200)} builds on itself")
        seen.add(following.resolve())
        assert isinstance(layer.value, dict)
        below = layer.value.pop("base", None)
        layers.insert(0, layer)
        following = _base(following, below) if below is not None and not below.is_null else None
    return layers


def _base(path: Path, below: Tree) -> Path:
    if not isinstance(below.value, str) or "${" in below.value:
        refuse("base", below, "must be the path of a YAML file, from this one's folder, or builtin:NAME")
    return find_file(below.value) if below.value.startswith(BUILTIN) else path.parent / expand_home(below.value)


def _read_yaml(path: Path) -> Tree:
    name = f"config: {shown(str(path), 400)}"
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise FileNotFoundError
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the path, or no UTF-8
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(f"{name} is not YAML: byte {error.start + 1} is not UTF-8") from None
        raise ConfigError(f"{name} is not a file; {_remedy(path)}") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{name} is over {MOST_BYTES} bytes")
    layer = parse(text.removeprefix("\ufeff"), name, str(path))
    if not isinstance(layer.value, dict):
        raise ConfigError(f"{name} must hold keys and values")
    return layer


def _remedy(path: Path) -> str:
    if path.stem in list_builtin():
        return f"did you mean {BUILTIN}{path.stem}, which comes with the package?"
    return "give the path of a YAML file or builtin:NAME"


def parse_override(override: str) -> Tree:
    """Return what `KEY=VALUE` sets.

    Raises:
        ConfigError: it is no override.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        remedy = "a text with spaces goes in quotes, and each of several images after a --reference-images of its own"
        raise ConfigError(f"override: {shown(override)} is not KEY=VALUE, as stages.transformer.replicas=2; {remedy}")
    if "[" in key:
        raise ConfigError(f"override: {shown(override)}: an item of a list cannot be set alone; write the whole list")
    path, kind = _split_key(key)
    tree = _parse_text(key, text.strip()) if is_text(kind) else parse(text, f"override: {shown(override)}")
    for part in reversed(path):
        tree = Tree({part: tree})
    return tree


def _split_key(key: str) -> tuple[list[str], Kind | None]:
    """Return a dotted key's parts and what it holds; the name of a custom resource or a label may have dots."""
    path: list[str] = []
    kind: Kind | None = SCHEMA
    parts = key.split(".")
    for index, part in enumerate(parts):
        if kind is not None and kind.is_free:
            return [*path, ".".join(parts[index:])], kind.item
        path.append(part)
        kind = kind and kind.child(part)
    return path, kind


def _parse_text(key: str, text: str) -> Tree:
    """Take an override's text as it is, unless it is quoted as in YAML."""
    if "\0" in text:
        raise ConfigError(f"override: {shown(key)} holds a NUL character")
    if not text.startswith(("'", '"', "[", "{")):
        return Tree(text)
    try:
        tree = parse(text, "override")
    except ConfigError:  # no YAML, but text all the same
        return Tree(text, quoted=True)
    if not isinstance(tree.value, str):
        refuse(key, tree, "must be text; put it in quotes")
    return tree


def to_yaml(config: Config, plain: Config | None = None) -> str:
    """Return the resolved configuration as YAML, with passwords masked.

    `plain` is the same without its preset: what differs is marked with `# speed=...`.
    """
    values = _masked(asdict(config))
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    if plain is None or config.speed == "exact":
        return text
    return _mark(text, _changed(values, _masked(asdict(plain))), f"  # speed={config.speed}")


def _changed(values: Any, others: Any, key: str = "") -> set[str]:
    """Return the dotted keys whose values differ, of two trees of the same keys."""
    if not isinstance(values, dict):
        return {key} if values != others else set()
    return {k for name, value in values.items() for k in _changed(value, others[name], f"{key}.{name}".strip("."))}


def _mark(text: str, keys: set[str], mark: str) -> str:
    """Append a mark to the lines of YAML that hold some dotted keys."""
    path: list[str] = []
    lines = []
    for line in text.splitlines():
        name, colon, _ = line.strip().partition(":")
        is_key = bool(colon) and not name.startswith("-")
        if is_key:
            path = [*path[: (len(line) - len(line.lstrip())) // 2], name]
        lines.append(line + (mark if is_key and ".".join(path) in keys - {"speed"} else "") + "\n")
    return "".join(lines)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(each) for each in value]
    return mask(value) if isinstance(value, str) else value

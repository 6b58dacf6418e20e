"""From YAML files (`base:` names the file below) and dotted overrides to one configuration, and back."""

from __future__ import annotations

import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from disagg_ray.config.fusing import fuse
from disagg_ray.config.schema import Config
from disagg_ray.config.tree import Tree, parse
from disagg_ray.config.typed import build, child_type, is_mapping, is_section, is_text, refuse
from disagg_ray.environment import expand_home
from disagg_ray.errors import ConfigError
from disagg_ray.text import mask, nearest, printable, shown

MOST_BYTES = 2**20
"""Of a file; the longest prompts fit many times."""


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file, the `base:` files below it and dotted overrides (`stages.transformer.replicas=2`).

    Raises:
        ConfigError: names the key, the value and the nearest right key.
    """
    merged = Tree({})
    for layer in (*_layers(expand_home(path)), *map(_parse_override, overrides)):
        merged = _merge(_drop_stages(merged, layer), _spread_bounds(layer))
    _check_groups(merged)
    config = build(Config, merged)
    assert isinstance(config, Config)
    folder = expand_home(config.model.path)
    if folder.is_dir():  # replicas have other working folders
        config = replace(config, model=replace(config.model, path=str(folder.absolute())))
    return fuse(config) if config.fused else config


def _merge(below: Tree, above: Tree) -> Tree:
    """Lay one tree over another, as OmegaConf does: sections key by key, all else as the upper one says."""
    layers = [OmegaConf.create(_sections(Config, tree), flags={"allow_objects": True}) for tree in (below, above)]
    return _tree(OmegaConf.merge(*layers), [above, below])


def _sections(kind: Any, tree: Tree) -> dict[str, Any]:
    """Return a tree's sections as dictionaries, and values as they were written.

    A section that says nothing changes nothing; a mapping that is empty, `{}`, empties the one below.
    """
    found: dict[str, Any] = {}
    assert isinstance(tree.value, dict)
    for key, value in tree.value.items():
        of_key = child_type(kind, key)
        if isinstance(value.value, dict) and (value.value or not is_mapping(of_key)):
            found[key] = _sections(of_key, value)
        else:
            found[key] = {} if value.is_empty and is_section(of_key) else Written(value)
    return found


def _tree(merged: Any, sources: list[Tree]) -> Tree:
    """Return what was merged as a tree again; each section's place is that of the uppermost source that has it."""
    if isinstance(merged, Written):
        return merged.tree
    values = {}
    for key in merged:
        below = [tree.value[key] for tree in sources if isinstance(tree.value, dict) and key in tree.value]
        values[key] = _tree(merged[key], below)
    place = next((tree.place for tree in sources if isinstance(tree.value, dict)), "")
    return Tree(values, place)


class Written:
    """A value as OmegaConf carries it: of a kind that it does not look into."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree


def _stages(tree: Tree) -> dict[str, Tree]:
    stages = tree.value.get("stages") if isinstance(tree.value, dict) else None
    return stages.value if stages is not None and isinstance(stages.value, dict) else {}


def _with_stages(tree: Tree, stages: dict[str, Tree]) -> Tree:
    if not isinstance(tree.value, dict) or not isinstance(tree.value.get("stages"), Tree):
        return tree
    return replace(tree, value=tree.value | {"stages": replace(tree.value["stages"], value=stages)})


def _drop_stages(merged: Tree, layer: Tree) -> Tree:
    """Let a stage that a layer sets to null go, so that others can take its blocks."""
    for name, stage in _stages(layer).items():
        if stage.is_empty:
            refuse(f"stages.{name}", stage, "must hold keys, or be null to leave the stage out")
    dropped = {name for name, stage in _stages(layer).items() if stage.is_null}
    for name in dropped - _stages(merged).keys():
        near = nearest(name, _stages(merged))
        if near is not None:
            refuse(f"stages.{name}", _stages(layer)[name], f"there is no such stage; did you mean {near}?")
    return _with_stages(merged, {name: s for name, s in _stages(merged).items() if name not in dropped})


def _spread_bounds(layer: Tree) -> Tree:
    """Read `replicas: {min, max}` as the least number to start with and the bounds; a plain number has none."""
    stages = {name: _spread(f"stages.{name}", stage) for name, stage in _stages(layer).items() if not stage.is_null}
    return _with_stages(layer, stages) if _stages(layer) else layer


def _spread(key: str, stage: Tree) -> Tree:
    if not isinstance(stage.value, dict) or "replicas" not in stage.value:
        return stage
    given = stage.value["replicas"]
    bounds = given.value
    if not isinstance(bounds, dict):
        free = {name: Tree("null") for name in ("min_replicas", "max_replicas")}
        return replace(stage, value=free | stage.value)
    if set(bounds) != {"min", "max"}:
        refuse(f"{key}.replicas", given, "must be a number, or {min: A, max: B}")
    least, most = bounds["min"], bounds["max"]
    return replace(stage, value=stage.value | {"replicas": least, "min_replicas": least, "max_replicas": most})


def _check_groups(merged: Tree) -> None:
    """Refuse a group that is new by mistake: it says nothing of replicas, and its name is like another's."""
    for name, stage in _stages(merged).items():
        tree = stage.value.get("groups") if isinstance(stage.value, dict) else None
        groups = tree.value if tree is not None and isinstance(tree.value, dict) else {}
        for group, given in groups.items():
            near = nearest(group, groups.keys() - {group})
            if near is not None and isinstance(given.value, dict) and "replicas" not in given.value:
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
        refuse("base", below, "must be the path of a YAML file, from this one's folder")
    return path.parent / expand_home(below.value)


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
        raise ConfigError(f"{name} is not a file; give the path of a YAML file such as conf/tiny_t2v.yaml") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{name} is over {MOST_BYTES} bytes")
    layer = parse(text.removeprefix("\ufeff"), name, str(path))
    if not isinstance(layer.value, dict):
        raise ConfigError(f"{name} must hold keys and values")
    return layer


def _parse_override(override: str) -> Tree:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override: {shown(override)} is not KEY=VALUE, as stages.transformer.replicas=2")
    if "[" in key:
        raise ConfigError(f"override: {shown(override)}: a place in a list cannot be set alone; write the whole list")
    path, kind = _split_key(key)
    tree = _parse_text(key, text.strip()) if is_text(kind) else parse(text, f"override: {shown(override)}")
    for part in reversed(path):
        tree = Tree({part: tree})
    return tree


def _split_key(key: str) -> tuple[list[str], Any]:
    """Return a dotted key's parts and the type of its value; what a mapping holds may have dots in its name."""
    path: list[str] = []
    kind: Any = Config
    parts = key.split(".")
    for index, part in enumerate(parts):
        if is_mapping(kind):
            return [*path, ".".join(parts[index:])], child_type(kind, "")
        path.append(part)
        kind = child_type(kind, part)
    return path, kind


def _parse_text(key: str, text: str) -> Tree:
    """Take an override's text as it is, unless it is one value in YAML's quotes."""
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


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, passwords hidden."""
    return OmegaConf.to_yaml(OmegaConf.create(_masked(asdict(config))))


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(each) for each in value]
    return mask(value) if isinstance(value, str) else value

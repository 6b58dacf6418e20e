"""From YAML files (`base:` names the file below) and dotted overrides to one configuration, and back: by OmegaConf."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]  # the parser below OmegaConf, for its errors
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from disagg_ray.config import (
    ClusterConfig,
    Config,
    DefaultsConfig,
    FailuresConfig,
    LimitsConfig,
    ModelConfig,
    OutputConfig,
    StageConfig,
    StandingConfig,
    TransportConfig,
)
from disagg_ray.environment import expand_home
from disagg_ray.errors import ConfigError
from disagg_ray.options import DenoiserConfig, VaeConfig

T = TypeVar("T")


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file, the `base:` files below it and dotted overrides (`stages.transformer.replicas=2`).

    Raises:
        ConfigError: names the key, the value and the nearest right key.
    """
    merged = OmegaConf.structured(Config)
    OmegaConf.set_readonly(merged, False)
    for source, layer in (*_layers(expand_home(path)), *map(_parse_override, overrides)):
        with _named_errors(source, layer):
            _drop_stages(merged, layer)
            _spread_bounds(layer)
            merged = OmegaConf.unsafe_merge(merged, layer)
    with _named_errors(str(path), merged):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    folder = expand_home(config.model.path)
    if folder.is_dir():  # replicas have other working folders
        config = replace(config, model=replace(config.model, path=str(folder.absolute())))
    return replace(config, stages={"fused": _fuse(config.stages.values())}, share_gpu=[]) if config.fused else config


def _drop_stages(merged: DictConfig, layer: DictConfig) -> None:
    """Let a stage that a layer sets to null go, so that others can take its blocks."""
    stages = layer.get("stages")
    if isinstance(stages, DictConfig):
        for name in [name for name, stage in stages.items() if stage is None]:
            del stages[name]
            merged.stages.pop(name, None)


def _spread_bounds(layer: DictConfig) -> None:
    """Read `replicas: {min, max}` as the least number to start with and the bounds; a plain number has none."""
    stages = layer.get("stages")
    for name in map(str, stages) if isinstance(stages, DictConfig) else ():
        stage = stages.get(name)
        if not isinstance(stage, DictConfig) or "replicas" not in stage:
            continue
        bounds = stage.replicas
        if not isinstance(bounds, DictConfig):
            stage.setdefault("min_replicas", None)
            stage.setdefault("max_replicas", None)
        elif set(bounds) != {"min", "max"}:
            raise ConfigError(f"stages.{name}.replicas: {dict(bounds)} is not possible: write a number, or min and max")
        else:
            stage.replicas, stage.min_replicas, stage.max_replicas = bounds["min"], bounds["min"], bounds["max"]


def _fuse(stages: Collection[StageConfig]) -> StageConfig:
    threads = [stage.num_threads for stage in stages if stage.num_threads is not None]
    dtypes = {stage.dtype for stage in stages}
    return StageConfig(
        blocks=[block for stage in stages for block in stage.blocks],
        replicas=max(stage.num_replicas for stage in stages),
        num_gpus=max(stage.num_gpus for stage in stages),
        num_cpus=max(stage.num_cpus for stage in stages),
        num_threads=max(threads, default=None),
        memory=max((stage.memory for stage in stages if stage.memory is not None), default=None),
        gpu_bytes=max((stage.gpu_bytes for stage in stages if stage.gpu_bytes is not None), default=None),
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
        cache_bytes=max(stage.cache_bytes for stage in stages),
        denoiser=_only("denoiser", [stage.denoiser for stage in stages], DenoiserConfig()),
        vae=_only("vae", [stage.vae for stage in stages], VaeConfig()),
        offload=_only("offload", [stage.offload for stage in stages], "none"),
        warm_up=[list(size) for size in dict.fromkeys(tuple(size) for stage in stages for size in stage.warm_up)],
    )


def _only(key: str, values: Iterable[T], default: T) -> T:
    """Return the one value that differs from the default, or the default."""
    asked: list[T] = []
    for value in values:
        if value != default and value not in asked:
            asked.append(value)
    if len(asked) > 1:
        raise ConfigError(f"fused: stages ask for different {key}: {asked[0]!r} and {asked[1]!r}; write one of them")
    return asked[0] if asked else default


@contextmanager
def _named_errors(source: str, layer: DictConfig) -> Iterator[None]:
    """Name the key of whatever OmegaConf refuses, or else the file or override it stands in."""
    try:
        yield
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ConfigError(_unknown_key(str(error.full_key), OmegaConf.select(layer, str(error.full_key)))) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: not given; write it in {source} or as {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or source}: {str(error).splitlines()[0]}") from error
    except TypeError as error:  # a list where keys belong, or the other way round
        raise ConfigError(f"{source}: {_one_line(error)}") from error


def _layers(path: Path) -> list[tuple[str, DictConfig]]:
    """Return the file and those it builds on with their names, lowest first."""
    layers: list[tuple[str, DictConfig]] = []
    seen: set[Path] = set()
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ConfigError(f"base: {following} builds on itself")
        seen.add(following.resolve())
        layer = _read_yaml(following)
        below = layer.pop("base", None)
        layers.insert(0, (str(following), layer))
        following = following.parent / str(below) if below else None
    return layers


def _read_yaml(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            f"config: {str(path)!r} is not a file; give the path of a YAML file such as conf/tiny_t2v.yaml"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: {str(path)!r} cannot be read: {_one_line(error)}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {str(path)!r} is not YAML: {_one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"config: {str(path)!r} must hold keys and values")
    return layer


def _parse_override(override: str) -> tuple[str, DictConfig]:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override: {override!r} is not KEY=VALUE, as stages.transformer.replicas=2")
    try:
        return override, OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override: {override!r} is not YAML after the =: {_one_line(error)}") from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def known_keys() -> list[str]:
    """Return every dotted key of the schema; a stage's name stands as `*`."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            value = getattr(node, f.name)
            yield prefix + f.name
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")

    sections = (
        ModelConfig, DefaultsConfig, LimitsConfig, TransportConfig, ClusterConfig, FailuresConfig, StandingConfig,
        OutputConfig,
    )  # fmt: skip
    names = ("model", "defaults", "limits", "transport", "cluster", "failures", "standing", "output")
    keys = [*names, "stages", "share_gpu", "gpu_turns", "progress", "fused"]
    for name, section in zip(names, sections, strict=True):
        keys += walk(section(), f"{name}.")
    return keys + list(walk(StageConfig(), "stages.*."))


def _unknown_key(key: str, value: object) -> str:
    parts = key.split(".")
    shown = [k.replace("*", parts[1]) if len(parts) > 1 else k for k in known_keys()]
    leaf = {k.rsplit(".", 1)[-1]: k for k in shown}
    near = difflib.get_close_matches(key, shown, n=1, cutoff=0.6)
    near = near or [leaf[n] for n in difflib.get_close_matches(parts[-1], leaf, n=1, cutoff=0.6)]
    return f"{key}: no such key for {value!r}" + (
        f"; did you mean {near[0]}?" if near else "; `disagg-ray config` prints them all"
    )


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))

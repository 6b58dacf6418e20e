"""`fused: true`: one stage with the blocks of all, which keeps, adds up or refuses what each of them asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NoReturn

from disagg_ray.config.options import TEXT_ENCODER
from disagg_ray.config.schema import Config
from disagg_ray.config.stages import GroupConfig, StageConfig
from disagg_ray.errors import ConfigError
from disagg_ray.text import shown

Stages = Mapping[str, StageConfig]


def fuse(config: Config) -> Config:
    """Return the configuration with one stage, `fused`, in place of all; nothing is left to share a GPU with.

    Raises:
        ConfigError: two stages ask for what one cannot have; names both.
    """
    stages = config.stages
    groups = _agree("groups", {name: stage.groups for name, stage in stages.items() if stage.groups})
    fused = _fuse({name: replace(stage, groups={}) for name, stage in stages.items()})
    if groups:
        fused = replace(fused, replicas=1, groups={name: _fuse_group(stages, name) for name in groups})
    return replace(config, stages={"fused": fused}, share_gpu=[])


def _fuse_group(stages: Stages, group: str) -> GroupConfig:
    """Return one group of the fused stage: the stages that have groups are taken as this one sees them."""
    for name, stage in stages.items():
        if not stage.groups and (stage.replicas, stage.max_replicas) != (1, None):
            raise ConfigError(
                f"invalid stages.{name}.replicas={stage.most_replicas}: fused with a stage that has groups, whose "
                f"replicas count; write 1"
            )
    fused = _fuse({name: stage.replica_groups[group] if stage.groups else stage for name, stage in stages.items()})
    return GroupConfig(**{f.name: getattr(fused, f.name) for f in fields(GroupConfig)})


def _fuse(stages: Stages) -> StageConfig:
    """Return one stage in place of several without groups. Keys that are not named below must agree."""
    every = list(stages.values())
    scaled = any(stage.max_replicas for stage in every)
    replicas = max(stage.least_replicas if stage.max_replicas else stage.replicas for stage in every)
    memory = [stage.memory for stage in every if stage.memory is not None]
    cached = {name: stage.cache_bytes for name, stage in stages.items() if TEXT_ENCODER in stage.blocks}
    dtypes = {name: stage.dtype for name, stage in stages.items()}
    limits = {name: stage.max_vram_bytes for name, stage in stages.items()}
    custom = dict.fromkeys(name for stage in every for name in stage.resources)
    special = {
        "blocks": [block for stage in every for block in stage.blocks],
        "replicas": replicas,
        "min_replicas": replicas if scaled else None,
        "max_replicas": max(stage.most_replicas for stage in every) if scaled else None,
        "num_gpus": max(stage.num_gpus for stage in every),
        "num_cpus": max(stage.num_cpus for stage in every),
        "memory": sum(memory) if memory else None,  # all that the stages hold is held at once
        "resources": {name: max(stage.resources.get(name, 0) for stage in every) for name in custom},
        "label_selector": _labels(stages),
        "num_threads": max(s.torch_threads for s in every) if any(s.num_threads for s in every) else None,
        "dtype": _agree("dtype", dtypes, "write model.dtype.* in place of both"),
        "device": _device(stages),
        "max_vram_bytes": _agree("max_vram_bytes", limits),
        "cache_bytes": _agree("cache_bytes", cached) or 0,
        "warm_up": [list(size) for size in dict.fromkeys(tuple(size) for stage in every for size in stage.warm_up)],
    }
    return StageConfig(
        **{f.name: _only(f.name, stages) for f in fields(StageConfig) if f.name not in special}, **special
    )


def _refuse(key: str, asked: Mapping[str, Any], remedy: str) -> NoReturn:
    (one, first), (other, second) = list(asked.items())[:2]
    raise ConfigError(
        f"invalid fused=true: stages.{one}.{key}={shown(first)} and stages.{other}.{key}={shown(second)} cannot go "
        f"into one stage; {remedy}"
    )


def _agree(key: str, asked: Mapping[str, Any], remedy: str = "write one value for both") -> Any:
    """Return the one value that stages ask for; None: none does."""
    distinct: dict[str, Any] = {}
    for name, value in asked.items():
        if value not in distinct.values():
            distinct[name] = value
    if len(distinct) > 1:
        _refuse(key, distinct, remedy)
    return next(iter(distinct.values()), None)


def _only(key: str, stages: Stages) -> Any:
    """Return the one value that differs from the default, or the default."""
    default = getattr(StageConfig(), key)
    asked = {name: value for name, stage in stages.items() if (value := getattr(stage, key)) != default}
    return _agree(key, asked) if asked else default


def _labels(stages: Stages) -> dict[str, str]:
    labels = dict.fromkeys(label for stage in stages.values() for label in stage.label_selector)
    selectors = {name: stage.label_selector for name, stage in stages.items()}
    return {
        label: _agree(f"label_selector.{label}", {name: has[label] for name, has in selectors.items() if label in has})
        for label in labels
    }


def _device(stages: Stages) -> str:
    """Return the device that stages name, if every stage would be on it; with num_gpus, `auto` means cuda."""
    named = {name: stage.device for name, stage in stages.items() if stage.device != "auto"}
    device = _agree("device", named)
    others = {name: stage.device for name, stage in stages.items() if stage.torch_device != "cpu"}
    if device == "cpu" and others:
        _refuse("device", {next(iter(named)): device} | others, "write one value for both")
    return device or "auto"

"""`fused: true`: one stage with the blocks of all, which keeps, adds up or refuses what each of them asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NoReturn

from disagg_ray.config.options import TEXT_ENCODER
from disagg_ray.config.schema import Config, GroupConfig, StageConfig
from disagg_ray.errors import ConfigError
from disagg_ray.text import shown

Stages = Mapping[str, StageConfig]


def fuse(config: Config) -> Config:
    """Return the configuration with one stage, `fused`, in place of all; nothing is left to share a GPU with.

    Raises:
        ConfigError: two stages ask for what one cannot have; names both.
    """
    return replace(config, stages={"fused": _fuse(config.stages)}, share_gpu=[])


def _fuse(stages: Stages) -> StageConfig:
    grouped = {name: stage for name, stage in stages.items() if stage.groups}
    groups = _agree("groups", {name: stage.groups for name, stage in grouped.items()}) or {}
    alone = {name: replace(stage, groups={}) for name, stage in stages.items()}
    fused = StageConfig(**{f.name: FUSED[f.name](f.name, alone) for f in fields(StageConfig)})
    if not groups:
        return fused
    return replace(fused, replicas=1, groups={name: _fuse_group(stages, name) for name in groups})


def _fuse_group(stages: Stages, group: str) -> GroupConfig:
    """Return one group of the fused stage: the stages that have groups are taken as this one sees them."""
    number = next(stage.groups[group].replicas for stage in stages.values() if stage.groups)
    for name, stage in stages.items():
        if not stage.groups and (stage.replicas, stage.max_replicas) != (1, None):
            raise ConfigError(
                f"invalid stages.{name}.replicas={stage.most_replicas}: fused with a stage that has groups, whose "
                f"replicas count; write 1"
            )
    seen = {name: stage.replica_groups[group] if stage.groups else stage for name, stage in stages.items()}
    fused = _fuse(seen)
    asked = {f.name: getattr(fused, f.name) for f in fields(GroupConfig)}
    return GroupConfig(**asked | {"replicas": number})


def _refuse(key: str, asked: Mapping[str, Any], remedy: str = "write one value for both") -> NoReturn:
    (one, first), (other, second) = list(asked.items())[:2]
    raise ConfigError(
        f"invalid fused=true: stages.{one}.{key}={shown(first)} and stages.{other}.{key}={shown(second)} cannot go "
        f"into one stage; {remedy}"
    )


def _agree(key: str, asked: Mapping[str, Any], remedy: str = "write one value for both") -> Any:
    """Return the one value that is asked for; None: none is."""
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


def _largest(key: str, stages: Stages) -> Any:
    return max(getattr(stage, key) for stage in stages.values())


def _all_blocks(key: str, stages: Stages) -> list[str]:
    return [block for stage in stages.values() for block in getattr(stage, key)]


def _same(key: str, stages: Stages) -> Any:
    """Return what all say: here null means something too."""
    return _agree(key, {name: getattr(stage, key) for name, stage in stages.items()})


def _dtype(key: str, stages: Stages) -> Any:
    return _agree(key, {name: stage.dtype for name, stage in stages.items()}, "write model.dtype.* in place of both")


def _replicas(_: str, stages: Stages) -> int:
    return max(stage.least_replicas if stage.max_replicas else stage.replicas for stage in stages.values())


def _least(_: str, stages: Stages) -> int | None:
    return _replicas("", stages) if any(stage.max_replicas for stage in stages.values()) else None


def _most(_: str, stages: Stages) -> int | None:
    bounded = any(stage.max_replicas for stage in stages.values())
    return max(stage.most_replicas for stage in stages.values()) if bounded else None


def _threads(_: str, stages: Stages) -> int | None:
    given = any(stage.num_threads is not None for stage in stages.values())
    return max(stage.torch_threads for stage in stages.values()) if given else None


def _memory(_: str, stages: Stages) -> int | None:
    """All that the stages hold is held at once."""
    given = [stage.memory for stage in stages.values() if stage.memory is not None]
    return sum(given) if given else None


def _device(key: str, stages: Stages) -> str:
    """Return the device that is named, if every stage would be on it; with num_gpus, `auto` means cuda."""
    named = {name: stage.device for name, stage in stages.items() if stage.device != "auto"}
    device = _agree(key, named)
    if device == "cpu":
        others = {name: stage.device for name, stage in stages.items() if stage.torch_device != "cpu"}
        if others:
            _refuse(key, {next(iter(named)): device} | others)
    return device or "auto"


def _labels(key: str, stages: Stages) -> dict[str, str]:
    names = dict.fromkeys(label for stage in stages.values() for label in stage.label_selector)
    selectors = {name: stage.label_selector for name, stage in stages.items()}
    return {
        label: _agree(f"{key}.{label}", {name: has[label] for name, has in selectors.items() if label in has})
        for label in names
    }


def _cache(key: str, stages: Stages) -> int:
    """Return what the stages say that have a use for it."""
    asked = {name: getattr(stage, key) for name, stage in stages.items() if TEXT_ENCODER in stage.blocks}
    return int(_agree(key, asked)) if asked else 0


def _resources(_: str, stages: Stages) -> dict[str, float]:
    names = dict.fromkeys(name for stage in stages.values() for name in stage.resources)
    return {name: max(stage.resources.get(name, 0) for stage in stages.values()) for name in names}


def _sizes(key: str, stages: Stages) -> list[list[int]]:
    return [list(size) for size in dict.fromkeys(tuple(size) for s in stages.values() for size in getattr(s, key))]


def _none(_: str, __: Stages) -> dict[str, GroupConfig]:
    return {}


FUSED: dict[str, Callable[[str, Stages], Any]] = {
    "blocks": _all_blocks,
    "replicas": _replicas,
    "min_replicas": _least,
    "max_replicas": _most,
    "num_gpus": _largest,
    "num_cpus": _largest,
    "memory": _memory,
    "resources": _resources,
    "label_selector": _labels,
    "accelerator_type": _only,
    "placement": _only,
    "groups": _none,
    "num_threads": _threads,
    "dtype": _dtype,
    "device": _device,
    "max_vram_bytes": _same,
    "cache_bytes": _cache,
    "denoiser": _only,
    "vae": _only,
    "offload": _only,
    "warm_up": _sizes,
}
"""How each key of the stages becomes the fused stage's."""

"""`speed`: what a preset sets of the stages' keys, wherever the user has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from disagg_ray.config.options import TEXT_ENCODER, parse_part
from disagg_ray.models.families import FAMILIES

if TYPE_CHECKING:
    from disagg_ray.config.schema import Config
    from disagg_ray.config.stages import StageConfig

SPEEDS = ("exact", "fast", "smallest")


def preset_stages(config: Config) -> dict[str, dict[str, Any]]:
    """Return the keys that the configuration's preset sets, by stage; stages on the CPU run as they are."""
    defaults = config.defaults
    size = [defaults.height, defaults.width, defaults.num_frames]
    presets: dict[str, dict[str, Any]] = {}
    for name, stage in config.stages.items():
        on_gpu = any(group.torch_device == "cuda" for group in stage.replica_groups.values())
        keys = {"fast": _fast(stage, size), "smallest": _smallest(stage)}.get(config.speed, {}) if on_gpu else {}
        for key in FAMILIES[config.model.family].lacks:
            _leave_out(keys, key.removeprefix("stages.").split("."))
        if keys:
            presets[name] = keys
    return presets


def _leave_out(keys: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        keys = keys.get(part, {})
    keys.pop(path[-1], None)


def _fast(stage: StageConfig, size: list[int]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if "denoise" in stage.blocks:
        compiled = {"compile": "default"} if stage.denoiser.quantization != "fp8_storage" else {}
        keys["denoiser"] = {"attention": "auto", "fuse": True} | compiled
    if _has_vae(stage):
        precision = {"dtype": "float16"} if stage.dtype is None else {}
        keys["vae"] = {"channels_last": True, "compile": True} | precision
    return keys | {"warm_up": [size]} if keys else {}


def _smallest(stage: StageConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    large = {"denoise", TEXT_ENCODER, "image_encoder"} & set(stage.blocks)
    if large and stage.denoiser.quantization != "fp8" and not _is_gang(stage):
        keys["offload"] = "group"
    if _has_vae(stage) and not any(map(parse_part, stage.blocks)) and not _is_gang(stage):
        keys["vae"] = {"tile_pixels": 0}
    return keys


def _is_gang(stage: StageConfig) -> bool:
    return any(group.parallel.is_gang for group in stage.replica_groups.values())


def _has_vae(stage: StageConfig) -> bool:
    return any(block in ("decode", "vae_encoder") or parse_part(block) for block in stage.blocks)

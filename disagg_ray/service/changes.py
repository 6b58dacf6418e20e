"""What may change in the configuration of a running service, and what it becomes."""

from __future__ import annotations

from dataclasses import replace

from disagg_ray.config.schema import Config
from disagg_ray.errors import ConfigError

CHANGEABLE = (
    "replicas", "min_replicas", "max_replicas", "num_gpus", "num_cpus", "memory", "resources", "label_selector",
    "accelerator_type", "placement", "cache_bytes", "denoiser", "vae", "parallel", "offload", "warm_up",
)  # fmt: skip
"""Settings of a stage that may change while the service runs. Some of the denoiser's and the VAE's change frames a
little, as their user wants."""


def check_change(before: Config, after: Config) -> None:
    """Check that a service can become what a configuration says.

    Raises:
        ConfigError: a key cannot be changed while the service runs; names it.
    """
    remedy = "it cannot change while the service runs; take it down and up again"
    limits = replace(after.limits, max_queued=before.limits.max_queued)
    for key in ("model", "limits", "transport", "share_gpu", "gpu_turns", "progress", "output"):
        if getattr(before, key) != (limits if key == "limits" else getattr(after, key)):
            raise ConfigError(f"{key}: {remedy}")
    if before.failures.stall_s != after.failures.stall_s:  # replicas have it from their start
        raise ConfigError(f"failures.stall_s: {remedy}")
    if before.stages.keys() != after.stages.keys():
        raise ConfigError(f"stages: {remedy}")
    for name, stage in before.stages.items():
        for key, value in vars(stage).items():
            if key not in CHANGEABLE and getattr(after.stages[name], key) != value:
                raise ConfigError(f"stages.{name}.{key}: {remedy}")
        if stage.torch_threads != after.stages[name].torch_threads:
            raise ConfigError(f"stages.{name}.num_cpus: with it the torch threads change; write num_threads as before")


def scaled(config: Config, stage: str, replicas: int) -> Config:
    """Return a configuration with `replicas` replicas of a stage.

    Raises:
        ConfigError: the stage cannot have that number.
    """
    if stage not in config.stages:
        raise ConfigError(f"{stage}: no such stage; there are {', '.join(config.stages)}")
    settings = config.stages[stage]
    if stage in config.share_gpu or settings.groups:
        raise ConfigError(f"{stage}: stages with groups or a shared GPU keep their number; take down and up again")
    least, most = settings.min_replicas, settings.max_replicas
    if least is not None and most is not None and not least <= replicas <= most:
        raise ConfigError(f"{stage}: {replicas} is outside its bounds, {least} to {most}; `up` can change them")
    return resized(config, stage, replicas)


def changed(before: Config, after: Config) -> Config:
    """Return a new configuration with the numbers of replicas that the load has decided, as far as it allows them.

    Raises:
        ConfigError: a key cannot be changed while the service runs; names it.
    """
    check_change(before, after)
    for name, stage in after.stages.items():
        if stage.max_replicas is not None:
            after = resized(after, name, max(stage.replicas, min(before.stages[name].replicas, stage.max_replicas)))
    return after


def resized(config: Config, stage: str, replicas: int) -> Config:
    return replace(config, stages=config.stages | {stage: replace(config.stages[stage], replicas=replicas)})

"""Finished latents in a file, so that even a dead driver's denoise need not be computed again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from disagg_ray.config import Config
from disagg_ray.errors import OutputError
from disagg_ray.output import atomic_file
from disagg_ray.request import ResolvedRequest

logger = logging.getLogger("disagg_ray")


def describe(request: ResolvedRequest, config: Config) -> dict[str, str]:
    """Return what latents depend on: the request, and the model with the precision of each stage."""
    asked = {name: value for name, value in asdict(request).items() if name not in ("id", "priority", "fps", "format")}
    dtypes = {stage: settings.dtype for stage, settings in config.stages.items()}
    model = asdict(config.model) | {"stage_dtype": dtypes}
    return {"request": json.dumps(asked, sort_keys=True), "model": json.dumps(model, sort_keys=True)}


def write_latents(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write tensors whole or not at all, in safetensors format.

    Raises:
        OutputError: the file cannot be written.
    """
    metadata = {**about, "sha256": _digest(tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as sink:
            sink.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    except OSError as error:
        raise OutputError(f"output: latents could not be written to {str(path)!r}: {error}") from error


def read_latents(path: Path, about: Mapping[str, str]) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a file, or None when there is none, it is of something else, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        logger.warning("latents in %s are not used: %s", path, error)
        return None
    if metadata != {**about, "sha256": _digest(tensors)}:
        logger.warning("latents in %s are not used: they are damaged, or another request's or model's", path)
        return None
    return tensors


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

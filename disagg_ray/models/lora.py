"""LoRA files: checked before a weight changes, then loaded as the stock pipelines load them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from disagg_ray.config.options import LoraConfig
from disagg_ray.environment import expand_home
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import MAX_NUMBER
from disagg_ray.models.families import model_of
from disagg_ray.models.files import one_line
from disagg_ray.models.lora_files import check_header
from disagg_ray.text import printable

logger = logging.getLogger("disagg_ray")

PREFIX = "transformer."
"""Of every key of a LoRA in diffusers' own format."""
DROPPED = (".diff", ".diff_b", "dora_scale")
"""Ends of keys that diffusers may leave out when it converts a file: whole changes of norms, embeddings, modulation."""
FACTORS = ("lora_A.weight", "lora_B.weight")


def load_loras(key: str, transformer: Any, loras: Sequence[LoraConfig]) -> None:
    """Load files into a transformer, as `load_lora_weights` and then `set_adapters` of the stock pipelines do.

    Says how many of a file's keys take effect, and names those that stock leaves out.

    Raises:
        CheckpointError: a file is missing, malformed, or changes something that this transformer lacks.
    """
    for number, lora in enumerate(loras):
        name = f"{key}: {printable(lora.path)!r}"
        weights, metadata = _read(name, expand_home(lora.path))
        try:
            converted = model_of(transformer).convert_lora(transformer, dict(weights))
        except Exception as error:  # diffusers raises every kind for keys it does not expect
            raise CheckpointError(f"{name} cannot be read as a LoRA: {one_line(error)}") from error
        unused = _check_fit(name, weights, converted, transformer)
        try:
            transformer.load_lora_adapter(converted, adapter_name=f"lora_{number}", metadata=metadata)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # so does peft, for shapes and layers
            raise CheckpointError(f"{name} cannot be loaded: {one_line(error)}") from error
        _log_use(name, len(weights), unused)
    if loras:
        transformer.set_adapters([f"lora_{n}" for n in range(len(loras))], [lora.strength for lora in loras])


def _log_use(name: str, num_keys: int, unused: Sequence[str]) -> None:
    if unused:
        logger.warning(
            "%s: %d of its %d keys take effect; stock pipelines leave the others out, as %r",
            name, num_keys - len(unused), num_keys, printable(unused[0]),
        )  # fmt: skip
    else:
        logger.info("%s: all of its %d keys take effect", name, num_keys)


def _read(name: str, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return a file's finite tensors by key, and what it says of the adapter."""
    check_header(name, file)
    try:
        weights = safetensors.torch.load_file(file)
        metadata = _read_metadata(file)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be read as a LoRA: {one_line(error)}") from error
    for key, tensor in weights.items():
        values = tensor.float()
        scale = not key.endswith(".alpha") or 0 <= float(values.min()) <= float(values.max()) <= MAX_NUMBER
        if not bool(values.isfinite().all()) or not scale:
            raise CheckpointError(f"{name} holds numbers that are not finite, or no scale, in {printable(key)!r}")
    return weights, metadata


def _read_metadata(file: Path) -> dict[str, Any] | None:
    """Return what diffusers keeps of the adapter in a file. Source: `diffusers.loaders.lora_base`."""
    with safetensors.safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return None
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError(f"its {LORA_ADAPTER_METADATA_KEY} must be a JSON object")
    pending: list[Any] = [metadata]
    while pending:
        value = pending.pop()
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
            raise ValueError(f"its {LORA_ADAPTER_METADATA_KEY} holds an impossible number")
    return metadata


def _check_fit(
    name: str, weights: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor], transformer: Any
) -> list[str]:
    """Return the keys that stock leaves out; refuse what it would leave out by mistake, or make up.

    Raises:
        CheckpointError: nothing is for this transformer, something has no place in it, or lacks its other factor.
    """
    known = {module.replace(".base_layer", "") for module, _ in transformer.named_modules()}
    kept = {id(tensor) for tensor in converted.values()}
    unused = [key for key in weights if key.endswith(DROPPED) and id(weights[key]) not in kept]
    extras = model_of(transformer).lora_extras
    strange: list[str] = []
    for key in converted:
        module, dot, _ = key.removeprefix(PREFIX).partition(".lora_")
        if dot and module in known:
            continue
        (unused if dot and any(part in extras for part in module.split(".")) else strange).append(key)
    if strange or len(unused) >= len(weights):
        raise CheckpointError(
            f"{name} does not fit this model: of its {len(weights)} keys {len(strange) or len(unused)} match no layer, "
            f"as {printable((strange or unused)[0])!r}"
        )
    for key in converted:
        module = key.partition(".lora_")[0]
        absent = [other for other in FACTORS if f"{module}.{other}" not in converted]
        if absent:
            raise CheckpointError(f"{name} holds {printable(key)!r} without {printable(f'{module}.{absent[0]}')!r}")
    return unused

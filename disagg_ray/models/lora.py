"""LoRA files: checked before a weight changes, then loaded as the stock pipelines load them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.loaders import WanLoraLoaderMixin
from safetensors import SafetensorError

from disagg_ray.environment import expand_home
from disagg_ray.errors import CheckpointError
from disagg_ray.options import LoraConfig

PREFIX = "transformer."
"""Of every key of a Wan LoRA in diffusers' own format."""


def load_loras(key: str, transformer: Any, loras: Sequence[LoraConfig]) -> None:
    """Load files into a transformer, as `load_lora_weights` and then `set_adapters` of the stock pipelines do.

    Raises:
        CheckpointError: a file is missing, no safetensors, or changes something that this transformer lacks.
    """
    for number, lora in enumerate(loras):
        weights, metadata = _read(key, lora)
        weights = WanLoraLoaderMixin._maybe_expand_t2v_lora_for_i2v(transformer, weights)
        _check_fit(key, lora, weights, transformer)
        try:
            transformer.load_lora_adapter(weights, adapter_name=f"lora_{number}", metadata=metadata)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{key}: {lora.path!r} cannot be loaded: {_one_line(error)}") from error
    if loras:
        transformer.set_adapters([f"lora_{n}" for n in range(len(loras))], [lora.strength for lora in loras])


def _read(key: str, lora: LoraConfig) -> tuple[dict[str, Any], Any]:
    file = expand_home(lora.path)
    if not file.is_file():
        raise CheckpointError(f"{key}: {lora.path!r} is no file on this node; give a .safetensors file")
    where = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    try:
        weights, metadata = WanLoraLoaderMixin.lora_state_dict(str(file.parent), **where, return_lora_metadata=True)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{key}: {lora.path!r} cannot be read as a LoRA: {_one_line(error)}") from error
    return weights, metadata


def _check_fit(key: str, lora: LoraConfig, weights: dict[str, Any], transformer: Any) -> None:
    """Refuse a file that holds nothing for this transformer, or something that it has no place for."""
    known = {name.replace(".base_layer", "") for name, _ in transformer.named_modules()}
    parts = [name.removeprefix(PREFIX).partition(".lora_") for name in weights]
    strange = [name for name, (module, dot, _) in zip(weights, parts, strict=True) if not dot or module not in known]
    if strange or not all(name.startswith(PREFIX) for name in weights) or not weights:
        raise CheckpointError(
            f"{key}: {lora.path!r} does not fit this model: of its {len(weights)} keys {len(strange)} match no layer"
            + (f", as {strange[0]!r}" if strange else "")
        )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]

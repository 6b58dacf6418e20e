"""Makes checkpoints of random weights: ordinary diffusers folders, of any shape that a family has."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from disagg_ray.errors import OutputError
from disagg_ray.models.families import find_shape

Record = dict[str, str | int]

PUBLISHED_NAMES = {
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "Qwen2VLImageProcessorPil": "Qwen2VLProcessor",
    "SiglipImageProcessorPil": "SiglipImageProcessor",
}
"""Classes in the indexes of published checkpoints, which take torchvision, by those that do without."""

RECORD_FILE = "disagg_ray.json"
"""In a checkpoint made here: of what it was made."""


def make_checkpoint(shape: str, folder: Path, *, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> Path:
    """Write a checkpoint of seeded random weights, unless the folder already holds it, and return the folder.

    The folder appears whole or not at all. The same arguments give the same bytes; another kind of device draws other
    numbers. Needs memory on the device for the largest component.
    Raises ValueError for an unknown shape, dtype or device, FileExistsError where the folder holds something else,
    OutputError where it cannot be written.
    """
    family, components = find_shape(shape)
    weights_dtype = floating_dtype(dtype)
    record: Record = {"shape": shape, "seed": seed, "dtype": dtype}
    if _is_made(folder, record):
        return folder
    try:
        torch.Generator(device)
    except RuntimeError as error:
        raise ValueError(
            f"invalid device={device!r}: torch has none such here; give cpu, or cuda with a GPU"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        _write_components(family.part("random"), components, partial, seed, weights_dtype, torch.device(device))
        (partial / RECORD_FILE).write_text(json.dumps(record) + "\n")
        _publish(partial, folder, record)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:  # as of a full disk
        said = f"folder: {str(folder)!r} could not be written: {error}"
        raise OutputError(f"{said}; make room, or give another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def draw(module: Any, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Draw a meta module's parameters, and the buffers that are saved with it, on the generator's device."""
    torch.nn.Module.to(module, dtype)  # diffusers' own warns of float32 layers, which is for loading to decide
    module.to_empty(device=generator.device)
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()  # to_empty gave tied parameters a tensor each
    for name, parameter in module.named_parameters():
        mean, std = _mean_std(name, parameter.shape)
        parameter.data.normal_(mean, std, generator=generator)
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in saved:
            buffer.normal_(1.0, 0.1, generator=generator)  # statistics of latents


def arguments(config: Any) -> dict[str, Any]:
    """Return a component's keyword arguments; its constructor wants lists for sequences, as JSON gives them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def byte_tokenizer(first: Sequence[str] = ()) -> Tokenizer:
    """Return a tokenizer of one token a byte, after the `first` ones."""
    tokens = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def floating_dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"no weight dtype {name!r}: one of {', '.join(dtypes)}")
    return dtypes[name]


def _write_components(
    maker: Any, shape: Any, folder: Path, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    modules, others = maker.build_meta(shape), maker.build_others(shape)
    for name, component in others.items():
        component.save_pretrained(folder / name)
    _write_index(shape, {**modules, **others}, folder)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in modules.items():
        _write_weights(module, folder / name, dtype, generator)


def _write_index(shape: Any, components: dict[str, Any], folder: Path) -> None:
    """Let the stock pipeline write `model_index.json` of the components, on whatever device."""
    pipeline = getattr(diffusers, shape.pipeline)(**components, **shape.settings)
    pipeline.save_config(folder)
    index = folder / "model_index.json"
    text = index.read_text()
    for made, published in PUBLISHED_NAMES.items():
        text = text.replace(f'"{made}"', f'"{published}"')
    index.write_text(text)


def _write_weights(module: Any, folder: Path, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Draw a meta module's parameters on the generator's device, save them and free them again."""
    draw(module, dtype, generator)
    module.save_pretrained(folder)
    torch.nn.Module.to(module, "meta")


def _mean_std(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter such that activations stay near 1 and nothing is symmetric."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return 1.0, 0.1  # a norm
    if name == "shared.weight":
        return 0.0, 1.0  # token embeddings
    return 0.0, math.prod(shape[1:]) ** -0.5


def _publish(partial: Path, folder: Path, record: Record) -> None:
    """Rename into place; where another process was quicker with the same checkpoint, keep that one."""
    try:
        partial.rename(folder)
    except OSError:
        if not _is_made(folder, record):
            raise


def _is_made(folder: Path, record: Record) -> bool:
    """Whether the folder holds that checkpoint, whole; FileExistsError where it holds anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    path = folder / RECORD_FILE
    found: Record | None = json.loads(path.read_text()) if path.is_file() else None
    if found != record:
        raise FileExistsError(f"{folder} holds {found or 'other files'}, not {record}: name another folder")
    return True

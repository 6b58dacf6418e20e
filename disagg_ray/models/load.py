"""One component of a checked model folder, loaded by the library it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import read_config, read_tensors
from disagg_ray.models.family import Component
from disagg_ray.models.files import one_line, quote

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}

SPARE_BYTES = 2**21
"""More than is lost when torch rounds tensors up."""


def load_component(
    kind: Component, model: Path, name: str, class_name: str, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Load a component of a model folder that was checked: of the class its index names, from safetensors alone.

    Raises:
        CheckpointError: its files do not make such a component, or lack some of its tensors.
    """
    folder = model / name
    component = find_class(kind, kind.loader or class_name)
    if component is None:
        raise CheckpointError(
            f"model.path: {name!r} of {quote(model)} is a {class_name}, which {kind.library} does not have here"
        )
    try:
        if kind.weights is None:
            code = {"trust_remote_code": False} if kind.library == "transformers" else {}
            loaded = component.from_pretrained(folder, local_files_only=True, **code)
            if name == "tokenizer":
                loaded("", padding="max_length", truncation=True, max_length=8)  # what it cannot do shows here
            return loaded
        place = {"device_map": {"": device}} if device != "cpu" else {}  # file to device, with no copy on the host
        loaded, found = component.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **place,
        )
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # these libraries raise every kind for what a folder holds, tokenizers the bare one
        raise CheckpointError(f"model.path: {quote(folder)} cannot be loaded: {one_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # which both libraries fill with random numbers
        raise CheckpointError(f"model.path: {quote(folder)} lacks {len(missing)} tensors, as {missing[0]!r}")
    return loaded.to(device).eval()


def find_class(kind: Component, class_name: str) -> Any:
    """Return a component's class; None: the library does not have it here."""
    module = LIBRARIES[kind.library] if kind.module is None else import_module(f"diffusers.pipelines.{kind.module}")
    return getattr(module, class_name, None)


def check_tensors(kind: Component, model: Path, name: str, class_name: str) -> None:
    """Refuse weights that are not those of the class and configuration in their folder, before memory is taken.

    Transformers renames tensors while it loads: of its classes the numbers are counted.

    Raises:
        CheckpointError: names a tensor that is missing, or of another shape.
    """
    if kind.weights is None:
        return
    folder = quote(model / name)
    try:
        module = _build_meta(kind, model, name, class_name)
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"model.path: {folder} cannot be loaded: {one_line(error)}") from error
    found = read_tensors(kind, model, name)
    if kind.library == "transformers":
        held, made = (sum(count) for count in ((t.num_elements for t in found.values()), _sizes(module)))
        if held < made:
            raise CheckpointError(
                f"model.path: {folder} holds {held} numbers, and its configuration makes {class_name}'s {made}"
            )
        return
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise CheckpointError(f"model.path: {folder} lacks {len(missing)} tensors, as {missing[0]!r}")
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise CheckpointError(
                f"model.path: {folder} holds {key!r} of shape {list(found[key].shape)}, and its configuration makes "
                f"{class_name}'s {list(shape)}"
            )


def _build_meta(kind: Component, model: Path, name: str, class_name: str) -> torch.nn.Module:
    """Return a component as its configuration says, without memory."""
    given = read_config(kind, model, name)
    made = find_class(kind, class_name)
    with torch.device("meta"):
        if kind.library == "diffusers":
            module: torch.nn.Module = made.from_config(given)
        else:
            module = made(made.config_class.from_pretrained(model / name, local_files_only=True))
    return module


def _sizes(module: torch.nn.Module) -> Iterator[int]:
    return (parameter.numel() for parameter in module.parameters())


def check_scheduler(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Refuse a scheduler that no request could use; it is not changed.

    Raises:
        CheckpointError: it cannot set a request's timesteps.
    """
    given: dict[str, Any] = {"sigmas": np.array(sigmas)} if sigmas else {"num_inference_steps": 2}
    if scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = 1.0  # the shift of some size
    try:
        copy.deepcopy(scheduler).set_timesteps(**given)
    except Exception as error:  # as above
        name = type(scheduler).__name__
        field = "model.sigmas" if sigmas else "model.path"
        raise CheckpointError(f"{field}: the scheduler {name} cannot be used: {one_line(error)}") from error


def reserve(nbytes: int, device: str) -> None:
    """Have torch keep one free piece of GPU memory that all of a model's weights fit into.

    Transformers does so too, but takes whatever else is free for a part of it: then the largest tensor (2 GB of a text
    encoder's) finds no room in the piece, and a hole as large stays in it for ever.
    """
    torch.empty(nbytes + SPARE_BYTES, dtype=torch.uint8, device=device)


def weight_bytes(module: torch.nn.Module) -> int:
    """Return what a module's parameters and buffers take."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)

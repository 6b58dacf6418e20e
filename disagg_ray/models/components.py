"""The components of a model folder: which files of each are opened, and whether each is what its family expects.

Only files in the model's own folder are opened, all weights are safetensors, every class is one of those
that the family names, and none of a folder's own code runs. Nothing here imports a model's library, so a driver can
ask it before anything starts.
"""

from __future__ import annotations

import importlib.util
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from disagg_ray.errors import CheckpointError
from disagg_ray.models.family import Component, Family
from disagg_ray.models.files import Tensor, one_line, quote, read_header, read_json
from disagg_ray.text import printable

MAX_NUMBER = 2**20
"""Largest whole number in a configuration; the largest published is a vocabulary of 256,384."""
MAX_LAYERS = 1024
LAYERS = ("num_layers", "num_hidden_layers", "num_res_blocks", "depth")
"""Keys that count layers, in configurations and in parts of them."""
FROM_ZERO = ("token_id", "vace_layers")
"""Ends of keys whose whole numbers may be 0."""
SMALL = (".json", ".model", ".txt")
"""Suffixes of files that are opened beside weights."""
CODE = ("auto_map", "custom_pipelines")
"""Keys of configurations that name code of a folder's own."""
ELSEWHERE = ("transformers_weights", "tokenizer_file", "vocab_file", "merges_file")
"""Keys of configurations that name another file to open in place of the usual one."""
UNSEEDED = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
"""Schedulers whose noise comes from a generator of their own."""


def read_components(family: Family, index: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return the class of each component that an index lists.

    Raises:
        CheckpointError: one is not of the class, or of the library, that the family expects.
    """
    found: dict[str, str] = {}
    for name, kind in family.components.items():
        entry = index.get(name)
        if entry is None or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise CheckpointError(
                f"model.path: {name!r} in {quote(path)} must be [library, class], not {printable(repr(entry))}"
            )
        library, class_name = entry
        fits = class_name in kind.classes or (not kind.classes and class_name.endswith("Scheduler"))
        if library != (kind.module or kind.library) or not fits or not class_name.isidentifier():
            known = f"one of {', '.join(kind.classes)}" if kind.classes else "a scheduler"
            raise CheckpointError(
                f"model.path: {name!r} in {quote(path)} is {printable(library)}.{printable(class_name)}, and must be "
                f"{known} of {kind.module or kind.library}; code from elsewhere is not run"
            )
        if class_name in UNSEEDED:
            raise CheckpointError(
                f"model.path: {class_name} in {quote(path)} draws noise that no seed governs; use another scheduler"
            )
        found[name] = class_name
    return found


def check_component(family: Family, folder: Path, name: str, *, partial: bool = False) -> None:
    """Check every file of a component that would be opened, and none of its weights' values.

    `partial`: what is not there may be on another machine, and is no fault.

    Raises:
        CheckpointError: a file is missing, malformed, outside the model's folder, no safetensors, or brings code.
    """
    component, kind = folder / name, family.components[name]
    if partial and not (component / kind.config).is_file():
        return
    if not component.is_dir():
        raise CheckpointError(f"model.path: the component folder {quote(component)} is missing")
    for path in sorted(component.iterdir()):
        if path.name.endswith(SMALL):
            check_inside(path, folder)
        if path.name == "adapter_config.json":
            raise CheckpointError(f"model.path: {quote(path)} brings weights from elsewhere; take it out of the folder")
    config = read_config(kind, folder, name)
    if name == "scheduler" and config.get("use_dynamic_shifting") and not family.shifts_by_size:
        raise CheckpointError(
            f"model.path: use_dynamic_shifting in {quote(component / kind.config)} wants a shift for each size, which "
            f"no {family.title} pipeline gives; write false there, and set model.flow_shift"
        )
    if name == "tokenizer" and not (component / "tokenizer.json").is_file():
        if importlib.util.find_spec("sentencepiece") is None and not partial:
            raise CheckpointError(
                f"model.path: {quote(component)} holds no tokenizer.json; install sentencepiece, which reads "
                f"spiece.model, or save the tokenizer anew where it is installed"
            )
    if kind.weights is not None:
        read_tensors(kind, folder, name, partial=partial)


def read_config(kind: Component, folder: Path, name: str) -> dict[str, Any]:
    """Return a component's configuration, its values of the types that the class wants."""
    path = folder / name / kind.config
    config = read_json(path)
    for key in CODE:
        if config.get(key):
            raise CheckpointError(
                f"model.path: {key} in {quote(path)} names code of the folder's own, which is never run; take it out"
            )
    for key in ELSEWHERE:
        if config.get(key) is not None:
            raise CheckpointError(
                f"model.path: {key} in {quote(path)} names another file to open; take it out, and give that file the "
                f"usual name"
            )
    for key, value in _walk(config):
        if key in LAYERS and isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(
                f"model.path: {key} in {quote(path)} is {_shown(value)}, and must be at most {MAX_LAYERS}"
            )
    for key, hint in get_type_hints(kind.values).items() if kind.values is not None else ():
        least, most = int(not key.endswith(FROM_ZERO)), MAX_LAYERS if key in LAYERS else MAX_NUMBER
        if key in config and not _fits(config[key], hint, least, most):
            raise CheckpointError(
                f"model.path: {key} in {quote(path)} is {_shown(config[key])}, and must be {_kind_of(hint)}"
            )
    return config


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a JSON value and of those in it, with what it holds."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield str(key), part
        yield from _walk(part)


def _fits(value: Any, hint: Any, least: int, most: int) -> bool:
    """Return whether a JSON value is of a type, and no number in it absurd."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option, least, most) for option in get_args(hint))
    if get_origin(hint) is tuple:
        of, *rest = get_args(hint)
        if not isinstance(value, list) or (len(value) > 64 if rest == [...] else len(value) != len(rest) + 1):
            return False
        return all(_fits(part, of, least, most) for part in value)
    if hint is int:
        return type(value) is int and least <= value <= most
    if hint is float:
        return type(value) in (int, float) and abs(value) <= most and math.isfinite(value)
    return isinstance(value, hint)


def _shown(value: Any) -> str:
    return printable(repr(value), 60) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"


def _kind_of(hint: Any) -> str:
    names = {int: f"a whole number up to {MAX_NUMBER}", float: "a number", bool: "true or false", str: "a text"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_kind_of(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list, each " + _kind_of(get_args(hint)[0])
    return names.get(hint, "null")


def weight_files(kind: Component, folder: Path, name: str) -> list[Path]:
    """Return the files that the component's library loads its weights from; whether they are there is not asked.

    Variants (`*.fp16.safetensors`) and other formats beside them are not read. Source: transformers takes one whole
    file before an index, diffusers an index before a whole file.
    """
    component = folder / name
    whole = component / f"{kind.weights}.safetensors"
    index = component / f"{kind.weights}.safetensors.index.json"
    if not index.is_file() or (kind.library == "transformers" and whole.is_file()):
        return [whole]
    listed = read_json(index)
    shards = listed.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(listed.get("metadata"), dict):
        raise CheckpointError(f"model.path: {quote(index)} must hold a weight_map and metadata")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"model.path: {quote(index)} names {printable(repr(shard))}; weights must be .safetensors files of the "
                f"same folder"
            )
    return [component / shard for shard in sorted(set(shards.values()))]


def read_tensors(kind: Component, folder: Path, name: str, *, partial: bool = False) -> dict[str, Tensor]:
    """Return what a component's weights say of their tensors, by name.

    Raises:
        CheckpointError: a file is missing, malformed or outside the model's folder.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(kind, folder, name):
        if not path.is_file():
            if partial:
                continue
            raise CheckpointError(
                f"model.path: {quote(path)} is missing; only .safetensors weights are loaded, no other format or "
                f"variant"
            )
        check_inside(path, folder)
        try:
            tensors |= read_header(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"model.path: {quote(path)}: {one_line(error)}") from error
    return tensors


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leaves the model's folder, but for the blobs of the hub's own cache."""
    home = folder.resolve()
    real = path.resolve()
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"model.path: {quote(path)} is outside of the model's folder, in {quote(real.parent)}; copy it into the "
            f"folder"
        )

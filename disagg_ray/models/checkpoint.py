"""A diffusers-format model folder: found, checked and measured without loading a weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config.builtin import BUILTIN
from disagg_ray.config.model import ModelConfig
from disagg_ray.environment import cache_folder, expand_home
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import (
    SMALL,
    check_component,
    check_inside,
    read_components,
    read_config,
    read_tensors,
    weight_files,
)
from disagg_ray.models.families import FAMILIES, family_of_pipeline
from disagg_ray.models.family import Family
from disagg_ray.models.files import read_json
from disagg_ray.models.geometry import Geometry
from disagg_ray.text import printable

RANDOM = "random:"


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder whose index and configurations have been read."""

    model: ModelConfig
    family: Family
    folder: Path
    components: dict[str, str]
    """Class name by component, as model_index.json lists them."""
    geometry: Geometry

    def fetch(self, names: Iterable[str]) -> None:
        """Bring the named components' files here and check every file that will be opened.

        Raises:
            CheckpointError: a component is missing, malformed, unsafe, or not of the class that the family expects.
        """
        names = sorted(names)
        for name in names:
            self._check_listed(name)
        if _is_hub_id(self.model.path):
            _download(self.model, [pattern for name in names for pattern in self._files(name)])
        for name in names:
            self.check(name)

    def check(self, name: str) -> None:
        """Check every file of a component that will be opened, all of which must be here.

        Raises:
            CheckpointError: as `fetch`.
        """
        self._check_listed(name)
        check_component(self.family, self.folder, name)

    def read_config(self, name: str) -> dict[str, Any]:
        """Return a component's configuration.

        Raises:
            CheckpointError: it is missing, malformed or unsafe.
        """
        return read_config(self.family.components[name], self.folder, name)

    def _files(self, name: str) -> list[str]:
        """Return patterns of a component's files in its repository, of which the indexes are here already."""
        small = [f"{name}/*{suffix}" for suffix in SMALL]
        kind = self.family.components[name]
        weights = weight_files(kind, self.folder, name) if kind.weights is not None else []
        return small + [f"{name}/{path.name}" for path in weights]

    def count_parameters(self, name: str) -> int | None:
        """Return a component's parameters, from its files' headers; None: the hub has not been asked for it yet.

        Raises:
            CheckpointError: the component is missing, or has weights in another format than safetensors.
        """
        self._check_listed(name)
        remote, kind = _is_hub_id(self.model.path), self.family.components[name]
        check_component(self.family, self.folder, name, partial=remote)
        if kind.weights is None:
            return 0
        if remote and not all(path.is_file() for path in weight_files(kind, self.folder, name)):
            return None
        return sum(tensor.num_elements for tensor in read_tensors(kind, self.folder, name).values())

    def _check_listed(self, name: str) -> None:
        if name not in self.components:
            raise CheckpointError(f"model.path: {str(self.folder)!r} does not list the component {name!r}")


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Find the folder of `model.path` on this machine and read its configurations.

    Raises:
        CheckpointError: no such folder, no such repository, another task than `model.task`, or an unknown model.
    """
    folder = _find(model)
    path = folder / "model_index.json"
    check_inside(path, folder)
    index = read_json(path)
    family = _family_of(model, str(index.get("_class_name")))
    geometry = family.part("geometry")
    tasks = geometry.tasks_of(index)
    if model.task not in tasks:
        raise CheckpointError(
            f"model.task: {model.task!r} does not fit {model.path!r}, which serves {' or '.join(tasks)}"
        )
    try:
        components = read_components(family, index, path)
        return Checkpoint(model, family, folder, components, geometry.read_geometry(model, folder, index, components))
    except KeyError as error:
        raise CheckpointError(f"model.path: {model.path!r} lacks {error} in a component's config.json") from error


def _family_of(model: ModelConfig, class_name: str) -> Family:
    """Return the family of a pipeline class, which must be the configuration's."""
    found = family_of_pipeline(class_name)
    if found is None:
        known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
        raise CheckpointError(f"model.path: {model.path!r} holds a {printable(class_name)}; known are {known}")
    if found.name != model.family:
        raise CheckpointError(
            f"model.family: {model.family!r} does not fit {model.path!r}, which holds a {class_name}; write "
            f"{found.name}"
        )
    return found


def check_here(model: ModelConfig, *, whole: bool) -> None:
    """Check what of a model this machine has, so that a fault shows before anything starts.

    `whole`: the stages run here and nowhere else, so what is missing here is a fault.

    Raises:
        CheckpointError: as `open_checkpoint` and `Checkpoint.fetch`.
    """
    if model.path.startswith(RANDOM):
        return  # made where it is wanted
    remote = _is_hub_id(model.path)
    if not whole and (remote or find_here(model) is None):
        return
    checkpoint = open_checkpoint(model)
    for name in checkpoint.components:
        check_component(checkpoint.family, checkpoint.folder, name, partial=remote or not whole)


def find_here(model: ModelConfig) -> Path | None:
    """Return a model's folder if this machine has it already; nothing is made or fetched."""
    if model.path.startswith(BUILTIN):
        return _builtin(model.path.removeprefix(BUILTIN))
    if model.path.startswith(RANDOM):
        folder = cache_folder() / "random" / model.path.removeprefix(RANDOM)
    elif _is_hub_id(model.path):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.path, "model_index.json", revision=model.revision)
        return Path(found).parent if isinstance(found, str) else None
    else:
        folder = expand_home(model.path)
    return folder if (folder / "model_index.json").is_file() else None


def _find(model: ModelConfig) -> Path:
    if model.path.startswith(BUILTIN):
        return _builtin(model.path.removeprefix(BUILTIN))
    if model.path.startswith(RANDOM):
        from disagg_ray.models.random import make_checkpoint

        shape = model.path.removeprefix(RANDOM)
        try:
            return make_checkpoint(shape, cache_folder() / "random" / shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"model.path: {model.path!r} cannot be made: {error}") from error
    if _is_hub_id(model.path):
        return _download(model, ["*.json"])
    folder = expand_home(model.path)
    if not folder.is_dir():
        raise CheckpointError(
            f"model.path: {model.path!r} is no folder on this node; give a diffusers-format folder "
            f"or a hub id (org/name)"
        )
    return folder


def _builtin(name: str) -> Path:
    known = {folder.name: folder for folder in sorted((Path(__file__).parent.parent / "builtin").iterdir())}
    if name not in known:
        raise CheckpointError(f"model.path: no model {name!r} comes with the package; known are {', '.join(known)}")
    return known[name]


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and path[0] not in ".~" and not Path(path).exists()


def _download(model: ModelConfig, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    if model.revision is None:
        raise CheckpointError(
            f"model.revision: null, but {model.path!r} is no folder on this node, and a hub id needs a commit or a tag"
        )
    if logging.root.handlers:
        logging.getLogger("huggingface_hub").handlers.clear()  # the root's print its lines, which would come twice
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"model.path: {model.path!r} could not be fetched from the hub: {reason}; give a folder in its place, or "
            f"run again once the hub can be reached"
        ) from error

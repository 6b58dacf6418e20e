"""Which files a model was loaded from, as digests that do not take reading gigabytes of weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from disagg_ray.config.builtin import BUILTIN
from disagg_ray.config.model import ModelConfig
from disagg_ray.environment import expand_home
from disagg_ray.models.checkpoint import RANDOM

SMALL_BYTES = 16 * 2**20
"""Files up to this size are known by their content, larger ones by size and time of change."""
READ = (".json", ".model", ".safetensors", ".txt")
"""Suffixes of the files of a model folder that are loaded."""
SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})$")
"""A commit's folder in the hub's cache, whose files never change."""


def local_folder(model: ModelConfig) -> Path | None:
    """Return the model's folder if this machine has it without asking the hub."""
    if model.path.startswith(BUILTIN):
        return Path(__file__).parent.parent / "builtin" / model.path.removeprefix(BUILTIN)
    folder = expand_home(model.path)
    return folder if folder.is_dir() else None


def digest_model(model: ModelConfig, folder: Path | None) -> str:
    """Return what identifies a model's files: of a hub id its commit; `folder` is None where it is not known."""
    if model.path.startswith(RANDOM):
        return "drawn from the shape"
    if folder is None:
        return f"revision {model.revision}"
    if (found := SNAPSHOT.search(str(folder))) is not None:
        return f"commit {found[1]}"
    digest = hashlib.sha256()
    for path in sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix in READ):
        digest.update(f"{path.relative_to(folder)}\0{_digest_weights(path)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def digest_file(path: str) -> str:
    """Return the digest of a file's content; a word where it cannot be read."""
    try:
        with expand_home(path).open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        return f"not read: {error.strerror}"


def _digest_weights(path: Path) -> str:
    try:
        state = path.stat()
    except OSError as error:
        return f"not read: {error.strerror}"
    return digest_file(str(path)) if state.st_size <= SMALL_BYTES else f"{state.st_size} {state.st_mtime_ns}"

"""Finished latents in a file, so that the denoise survives even the driver.

A file is read back as untrusted: its metadata must match the request and the blocks in use, and its tensor must have
the shape and dtype that the request needs, whole and finite.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from disagg_ray.errors import OutputError
from disagg_ray.graph import LATENTS
from disagg_ray.media.output import atomic_file
from disagg_ray.models.identity import identify_request
from disagg_ray.request import ResolvedRequest
from disagg_ray.text import printable

logger = logging.getLogger("disagg_ray")

MAX_HEADER_BYTES = 2**16
"""Largest header of a file, before its tensor; ours take one or two kilobytes."""


@dataclass(frozen=True)
class Wanted:
    """What latents must have been made from to be used."""

    request: ResolvedRequest
    blocks: Mapping[str, Collection[str]]
    """Digests of the replicas in service, by block that latents depend on."""
    shape: tuple[int, ...]


class _Unusable(Exception):
    pass


def describe(request: ResolvedRequest, blocks: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of latents; `blocks` are digests of the blocks that made them."""
    return {"request": identify_request(request), "blocks": json.dumps(dict(blocks), sort_keys=True)}


def write_latents(path: Path, latents: torch.Tensor, about: Mapping[str, str]) -> None:
    """Write latents whole or not at all, in safetensors format.

    Raises:
        OutputError: the file cannot be written.
    """
    metadata = {**about, "sha256": _digest(latents)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as sink:
            sink.write(save({LATENTS: latents.contiguous()}, metadata))
    except OSError as error:
        said = f"latents could not be kept in {str(path)!r}: {error.strerror or error}"
        raise OutputError(f"{said}; free space there, or make it writable") from error


def read_latents(path: Path, wanted: Wanted) -> torch.Tensor | None:
    """Return the latents of a file, or None if they are not those wanted, which is logged."""
    try:
        return _read(path, wanted)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, _Unusable) as error:
        said = "request %s: ignoring the latents in %s, computing them again: %s"
        logger.warning(said, wanted.request.id, path, printable(str(error), 500))
        return None


def _read(path: Path, wanted: Wanted) -> torch.Tensor:
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        raise _Unusable("not a regular file")
    if state.st_size > 4 * torch.Size(wanted.shape).numel() + MAX_HEADER_BYTES:
        raise _Unusable(f"{state.st_size} bytes are more than latents of {wanted.shape} take")
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        _check_origin(metadata, wanted)
        if list(file.keys()) != [LATENTS]:
            raise _Unusable(f"tensors other than {LATENTS}")
        found = file.get_slice(LATENTS)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if (shape, dtype) != (wanted.shape, "F32"):
            raise _Unusable(f"{dtype} of {shape}, but the request needs F32 of {wanted.shape}")
        latents: torch.Tensor = file.get_tensor(LATENTS)
    if metadata.get("sha256") != _digest(latents):
        raise _Unusable("wrong checksum")
    if not torch.isfinite(latents).all():
        raise _Unusable("numbers that are not finite")
    return latents


def _check_origin(metadata: Mapping[str, str], wanted: Wanted) -> None:
    if "blocks" not in metadata:
        raise _Unusable("no record of what made them, as in files of older versions")
    if metadata.get("request") != identify_request(wanted.request):
        raise _Unusable("made for another prompt, image or other field of the request")
    try:
        blocks: Any = json.loads(metadata["blocks"])
    except (ValueError, RecursionError) as error:
        raise _Unusable("no record of what made them") from error
    if not isinstance(blocks, dict) or set(blocks) != set(wanted.blocks):
        raise _Unusable(f"not made by the blocks {', '.join(wanted.blocks)}")
    other = [block for block, digest in blocks.items() if str(digest) not in wanted.blocks[block]]
    if other:
        raise _Unusable(f"made by another model, LoRA, precision, option or version of {', '.join(other)}")


def _digest(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()

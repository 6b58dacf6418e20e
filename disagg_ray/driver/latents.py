"""Finished latents in a file, so that even a dead driver's denoise need not be computed again.

A file is read back as untrusted: what it says it was made of decides whether it is used, and its tensor has to be the
one that the request needs, whole and finite.
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
"""Of a file, before its tensor; ours are a kilobyte or two."""


@dataclass(frozen=True)
class Wanted:
    """What latents must be of to be used."""

    request: ResolvedRequest
    blocks: Mapping[str, Collection[str]]
    """By block that has a part in them: the digests that replicas have which would make them now."""
    shape: tuple[int, ...]


class _Unfit(Exception):
    pass


def describe(request: ResolvedRequest, blocks: Mapping[str, str]) -> dict[str, str]:
    """Return what latents were made of; `blocks` are the digests of those that made them."""
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
        raise OutputError(f"output: latents could not be written to {str(path)!r}: {error}") from error


def read_latents(path: Path, wanted: Wanted) -> torch.Tensor | None:
    """Return the latents of a file, or None, with a word in the log, when they are not those that are wanted."""
    try:
        return _read(path, wanted)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, _Unfit) as error:
        reason = printable(str(error), 500)
        logger.warning("request %s: latents in %s are not used, but made again: %s", wanted.request.id, path, reason)
        return None


def _read(path: Path, wanted: Wanted) -> torch.Tensor:
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        raise _Unfit("it is no regular file")
    if state.st_size > 4 * torch.Size(wanted.shape).numel() + MAX_HEADER_BYTES:
        raise _Unfit(f"its {state.st_size} bytes are more than latents of {wanted.shape} take")
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        _check_origin(metadata, wanted)
        if list(file.keys()) != [LATENTS]:
            raise _Unfit(f"it does not hold just {LATENTS}")
        found = file.get_slice(LATENTS)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if (shape, dtype) != (wanted.shape, "F32"):
            raise _Unfit(f"they are {dtype} of {shape}, where the request needs F32 of {wanted.shape}")
        latents: torch.Tensor = file.get_tensor(LATENTS)
    if metadata.get("sha256") != _digest(latents):
        raise _Unfit("they are damaged")
    if not torch.isfinite(latents).all():
        raise _Unfit("they hold numbers that are not finite")
    return latents


def _check_origin(metadata: Mapping[str, str], wanted: Wanted) -> None:
    if "blocks" not in metadata:
        raise _Unfit("it does not say what made them, as older versions wrote it")
    if metadata.get("request") != identify_request(wanted.request):
        raise _Unfit("they are of another prompt, image or other field of the request")
    try:
        blocks: Any = json.loads(metadata["blocks"])
    except (ValueError, RecursionError) as error:
        raise _Unfit("it does not say what made them") from error
    if not isinstance(blocks, dict) or set(blocks) != set(wanted.blocks):
        raise _Unfit(f"they are not of the blocks {', '.join(wanted.blocks)}")
    other = [block for block, digest in blocks.items() if str(digest) not in wanted.blocks[block]]
    if other:
        raise _Unfit(f"{', '.join(other)}: another model, LoRA, precision, option or version made them")


def _digest(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()

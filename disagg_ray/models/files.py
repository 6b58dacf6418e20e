"""Files of a model folder and LoRA files, read as untrusted before any library opens them: each error is one line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from disagg_ray.errors import CheckpointError
from disagg_ray.text import printable

MAX_JSON_BYTES = 64 * 2**20
"""Of a configuration or an index; published ones take less than one MiB."""
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""
MAX_DIMENSIONS = 16
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of an element, by safetensors' names of types."""


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def quote(path: Path) -> str:
    """Return a path as errors name it."""
    return repr(printable(str(path), 300))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: it is missing, too large, not JSON, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"model.path: {quote(path)} is larger than {MAX_JSON_BYTES} bytes")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model.path: {quote(path)} is missing; is the folder a diffusers-format model?"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.path: {quote(path)} cannot be read: {one_line(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"model.path: {quote(path)} cannot be read: nested too deeply") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"model.path: {quote(path)} must hold a JSON object")
    return loaded


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, none of which is read.

    Raises:
        ValueError: it is no whole safetensors file; says why.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("no safetensors file: its header is longer than the file or than any header")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except RecursionError as error:
            raise ValueError("no safetensors file: its header is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"no safetensors file: its header is not JSON: {one_line(error)}") from error
    if not isinstance(header, dict):
        raise ValueError("no safetensors file: its header must be a JSON object")
    header.pop("__metadata__", None)
    ends = [_read_entry(key, entry) for key, entry in header.items()]
    position = 0
    for (begin, end), key in sorted(zip((span for _, span in ends), header, strict=True)):
        if begin != position:
            raise ValueError(f"tensor {printable(key)!r} does not begin where the one before it ends")
        position = end
    if position != size - 8 - length:
        raise ValueError(f"holds {size - 8 - length} bytes of tensors, and its header describes {position}")
    return dict(zip(header, (tensor for tensor, _ in ends), strict=True))


def _read_entry(key: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return a tensor and where its bytes begin and end."""
    where = f"tensor {printable(key)!r} of its header"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a JSON object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{where} has the unknown type {printable(repr(dtype))}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where} has the impossible shape {printable(repr(shape))}")
    if not _are_counts(span) or len(span) != 2 or (span[1] - span[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{where} has offsets that do not fit its shape: {printable(repr(span))}")
    return Tensor(dtype, tuple(shape)), (span[0], span[1])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def one_line(error: object) -> str:
    """Return a library's message for the end of one of ours."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 300)

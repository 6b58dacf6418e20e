"""How torch takes memory of a GPU where the user has its segments grow (`expandable_segments`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from disagg_ray.environment import cuda_allocator

_GROWING = re.compile(r"(expandable_segments\s*:\s*)True")


@contextmanager
def plain_segments() -> Iterator[None]:
    """Within it torch takes GPU memory that Mooncake can register and other processes can open (CUDA IPC).

    Segments that grow are no such memory. The user's other settings stay: torch would forget what is not named again.
    """
    settings = cuda_allocator()
    plain, found = _GROWING.subn(r"\1False", settings)
    if not found:
        yield
        return
    torch._C._accelerator_setAllocatorSettings(plain)  # nothing public does it
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)

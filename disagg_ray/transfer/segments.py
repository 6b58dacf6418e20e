"""How torch takes memory of a GPU: in segments that grow (`expandable_segments`), but for what Mooncake registers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from disagg_ray import environment

GROWING = "expandable_segments:True"
IS_GROWING = re.compile(r"(expandable_segments\s*:\s*)True")


def grow_segments() -> None:
    """Have torch's segments of GPU memory grow, so that fewer holes are left; what the user has set stays."""
    if not environment.cuda_allocator():
        environment.default("PYTORCH_CUDA_ALLOC_CONF", GROWING)
        torch._C._accelerator_setAllocatorSettings(GROWING)  # torch may have read the variable already


@contextmanager
def plain_segments() -> Iterator[None]:
    """Within it torch takes GPU memory that Mooncake can register and other processes can open (CUDA IPC).

    Segments that grow are no such memory. The user's other settings stay: torch would forget what is not named again.
    """
    settings = environment.cuda_allocator()
    plain, found = IS_GROWING.subn(r"\1False", settings)
    if not found:
        yield
        return
    torch._C._accelerator_setAllocatorSettings(plain)  # nothing public does it
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)

"""The memory of a pool: one allocation that Mooncake can register and, of one on a GPU, a pinned copy on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from disagg_ray.errors import ConfigError
from disagg_ray.transfer.segments import plain_segments

_OWN_SEGMENT_BYTES = 32 * 2**20
"""Torch gives an allocation of this size a segment of its own, and only whole segments can be shared."""


class PoolMemory:
    """Zeroed bytes on a device, and the stream on which they are copied."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.data = _allocate(nbytes, device)
        """uint8, (nbytes,)."""
        is_cuda = self.data.is_cuda
        self.mirror = self.data.new_zeros(len(self.data), device="cpu", pin_memory=True) if is_cuda else None
        """A copy in host memory: Mooncake's tcp moves that about twice as fast."""
        self._stream = torch.cuda.Stream(self.data.device) if is_cuda else None  # type: ignore[no-untyped-call]

    @property
    def host(self) -> torch.Tensor:
        """The bytes in host memory: the copy, or of a CPU's pool the bytes themselves."""
        return self.data if self.mirror is None else self.mirror

    @contextmanager
    def own_stream(self, *, after_caller: bool = False) -> Iterator[None]:
        """Copy on a CUDA stream of this memory and wait for it alone, so that a pull does not wait for a denoise."""
        if self._stream is None:
            yield
            return
        if after_caller:
            self._stream.wait_stream(torch.cuda.current_stream(self.data.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()  # a copy that was cancelled still runs

    def to_mirror(self, start: int, end: int) -> None:
        """Copy bytes to the host, if they are not there; inside `own_stream`."""
        if self.mirror is not None:
            self.mirror[start:end].copy_(self.data[start:end], non_blocking=True)

    def from_mirror(self, start: int, end: int) -> None:
        """Copy bytes from the host, if they are not here; inside `own_stream`."""
        if self.mirror is not None:
            self.data[start:end].copy_(self.mirror[start:end], non_blocking=True)

    def forget_cuda_error(self) -> None:
        """Take the error that a failed CUDA call of Mooncake leaves for this thread's next kernel to find."""
        if self.data.is_cuda:
            with suppress(torch.AcceleratorError):
                torch.ones(1, device=self.data.device)


def _allocate(nbytes: int, device: str) -> torch.Tensor:
    """Return zeroed memory that can be registered; on a GPU, an allocation that nothing else shares.

    Raises:
        ConfigError: the GPU, or the machine, has not that much.
    """
    if device == "cpu":
        try:
            return torch.zeros(nbytes, dtype=torch.uint8)
        except (RuntimeError, TypeError) as error:  # TypeError: of more bytes than a number of torch's holds
            raise ConfigError(
                f"transport.pool_bytes: a pool of {nbytes} bytes does not fit this machine's memory; lower limits or "
                f"pool_bytes, or replicas"
            ) from error
    try:
        with plain_segments():
            return torch.zeros(max(nbytes, _OWN_SEGMENT_BYTES), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"transport.pool_bytes: a pool of {nbytes} bytes does not fit the GPU, which has {free} of {total} free; "
            f"lower limits or pool_bytes, or give the stage more of a GPU"
        ) from error

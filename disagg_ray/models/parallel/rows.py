"""The rows of one video over several ranks, in Wan's VAE decoder: no tiles and no seams.

Each rank decodes some rows of the latents. What reaches further is passed between them: each convolution gets its
neighbours' nearest rows where one process has them, and the middle block's attention the keys and values of all rows.
Norms, activations and upsampling work within a row. The frames are put together at rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

from disagg_ray.errors import RequestError
from disagg_ray.models.parallel.ranks import Ranks

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]

HEIGHT = -2
"""The dimension of rows in latents, activations and frames (..., height, width)."""
HALO = 1
"""Rows of a neighbour that a convolution of Wan's decoder reads: its kernels have 3."""


def split_rows(vae: Any, ranks: Ranks) -> None:
    """Have each rank decode a share of the rows; rank 0 gets the frames, the others get frames without rows."""
    rows = _Rows(ranks)
    vae.decoder.register_forward_pre_hook(rows.take)
    vae.decoder.register_forward_hook(rows.put_together)
    for module in vae.decoder.modules():
        if isinstance(module, WanAttentionBlock):
            module.forward = partial(_attend, rows, module)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[1] > 1:  # it pads before it convolves
            module._conv_forward = partial(_convolve_padded, rows, module._conv_forward)
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            vars(module).update(padding=(0, 1), _conv_forward=partial(_convolve, rows, module._conv_forward))


class _Rows:
    """Which rows are whose in the video that is decoded now, and what the ranks pass each other."""

    def __init__(self, ranks: Ranks) -> None:
        self._rank, self._size = ranks.rank, ranks.size
        self._others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        self._counts: list[int] = []
        """Rows of the latents, by rank."""

    def take(self, _: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return this rank's rows of latents (1, channels, frames, height, width): a forward pre-hook."""
        latents, *rest = args
        height = latents.shape[HEIGHT]
        if height < self._size * HALO:
            raise RequestError(
                f"this height has {height} rows of latents, which is fewer than the {self._size} ranks that share them "
                f"(parallel.rows); choose another height"
            )
        shares = latents.tensor_split(self._size, dim=HEIGHT)
        self._counts = [share.shape[HEIGHT] for share in shares]
        return shares[self._rank], *rest

    def put_together(self, _: Any, __: Any, frames: Tensor) -> Tensor:
        """Return all rows of the frames at rank 0, and none at the others: a forward hook."""
        if self._rank > 0:
            self._exchange({0: frames}, frames, {})
            return frames.narrow(HEIGHT, 0, 0)
        scale = frames.shape[HEIGHT] // self._counts[0]
        heights = {rank: scale * self._counts[rank] for rank in self._others}
        return torch.cat([frames, *self._exchange({}, frames, heights).values()], dim=HEIGHT)

    def fill(self, padded: Tensor) -> Tensor:
        """Put the neighbours' rows into the first and the last one, which are zero where the video ends."""
        last = padded.shape[HEIGHT] - HALO
        sent = {
            self._rank - 1: padded.narrow(HEIGHT, HALO, HALO),
            self._rank + 1: padded.narrow(HEIGHT, last - HALO, HALO),
        }
        sent = {rank: edge for rank, edge in sent.items() if rank in self._others}
        for rank, edge in self._exchange(sent, padded, dict.fromkeys(sent, HALO)).items():
            padded.narrow(HEIGHT, 0 if rank < self._rank else last, HALO).copy_(edge)
        return padded

    def gather(self, own: Tensor) -> Tensor:
        """Return what all ranks have of something (..., pixels of whole rows, channels)."""
        width = own.shape[HEIGHT] // self._counts[self._rank]
        sizes = {rank: width * self._counts[rank] for rank in self._others}
        parts = self._exchange(dict.fromkeys(self._others, own), own, sizes) | {self._rank: own}
        return torch.cat([parts[rank] for rank in range(self._size)], dim=HEIGHT)

    def _exchange(self, sent: Mapping[int, Tensor], like: Tensor, heights: Mapping[int, int]) -> dict[int, Tensor]:
        """Send tensors to some ranks while others' come, which are as `like` but for their heights; return those."""
        shapes = {rank: (*like.shape[:HEIGHT], height, like.shape[-1]) for rank, height in heights.items()}
        received = {rank: like.new_empty(shape) for rank, shape in shapes.items()}
        sends = [dist.P2POp(dist.isend, tensor.contiguous(), rank) for rank, tensor in sent.items()]
        receives = [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in received.items()]
        for transfer in dist.batch_isend_irecv([*sends, *receives]):
            transfer.wait()
        return received


def _convolve_padded(rows: _Rows, convolve: Convolve, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolve(rows.fill(padded), weight, bias)


def _convolve(rows: _Rows, convolve: Convolve, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolve(rows.fill(functional.pad(x, (0, 0, HALO, HALO))), weight, bias)


def _attend(rows: _Rows, block: Any, x: Tensor) -> Tensor:
    """Return WanAttentionBlock's result for this rank's rows of x (1, channels, frames, rows, width)."""
    batch, channels, frames, height, width = x.shape
    images = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
    qkv = block.to_qkv(block.norm(images)).reshape(batch * frames, 1, 3 * channels, -1)
    query, *keys_values = qkv.permute(0, 1, 3, 2).contiguous().chunk(3, dim=-1)
    key, value = rows.gather(torch.cat(keys_values, dim=-1)).chunk(2, dim=-1)
    made = functional.scaled_dot_product_attention(query, key, value)
    out: Tensor = block.proj(made.squeeze(1).permute(0, 2, 1).reshape(images.shape))
    return out.view(batch, frames, channels, height, width).permute(0, 2, 1, 3, 4) + x

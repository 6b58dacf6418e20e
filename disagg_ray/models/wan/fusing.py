"""Fewer passes over a Wan transformer's activations: what differs from stock by rounding alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttnProcessor,
    _get_added_kv_projections,
    _get_qkv_projections,
)
from torch import Tensor, nn

from disagg_ray.models.wan.geometry import IMAGE_TEXT_TOKENS


def _blocks(transformer: Any) -> list[Any]:
    """Return its blocks, and those of VACE's control."""
    return [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]


def fuse_activation(transformer: Any) -> None:
    """Have the feed-forward's first matrix product apply bias and GELU before it writes, on a GPU; of plain weights."""
    for block in _blocks(transformer):
        linear = block.ffn.net[0].proj
        if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:  # LoRA, torchao
            continue
        if linear.weight.dtype.itemsize > 1:
            block.ffn.net[0].__class__ = FusedGelu


class FusedGelu(GELU):  # type: ignore[misc]
    """A linear layer and tanh's approximation of GELU in one kernel.

    A class, and not a function in place of each block's: torch would compile every block's anew, and refuse the ninth.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return GELU of x (..., in) times weights (out, in) plus bias."""
        if not x.is_cuda:
            plain: Tensor = super().forward(x)
            return plain
        rows = x.flatten(0, -2)
        made: Tensor = torch.ops.aten._addmm_activation(self.proj.bias, rows, self.proj.weight.t(), use_gelu=True)
        return made.view(*x.shape[:-1], -1)


def fuse_rotary(transformer: Any) -> None:
    """Rotate queries and keys in one pass without interleaved writes, by a table that each forward makes once."""
    rope = transformer.rope
    rope.forward = partial(_signed_table, type(rope).forward.__get__(rope))
    for block in _blocks(transformer):
        for attention in (block.attn1, block.attn2):
            backend = attention.processor._attention_backend
            attention.set_processor(RotaryProcessor())
            attention.processor._attention_backend = backend


def _signed_table(forward: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines, and sines whose even places are negative (1, tokens, 1, dim), of stock's table."""
    cos, sin = forward(latents)
    return cos, torch.stack((-sin[..., 0::2], sin[..., 1::2]), dim=-1).flatten(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (batch, tokens, heads, dim) with each pair of neighbours turned, computed in float32."""
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned: Tensor = x * cos + swapped * sin
    return turned.type_as(x)


class RotaryProcessor(WanAttnProcessor):  # type: ignore[misc]
    """Wan's attention on the table of `fuse_rotary`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        image = None
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            image, encoder_hidden_states = encoder_hidden_states.tensor_split([-IMAGE_TEXT_TOKENS], dim=1)
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        parallel = self._parallel_config if encoder_hidden_states is None else None
        made = self._attend(query, key, value, attention_mask, parallel)
        if image is not None:
            key, value = _get_added_kv_projections(attn, image)
            key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_added_k(key), value))
            made = made + self._attend(query, key, value, None, None)
        for layer in attn.to_out:
            made = layer(made)
        return made

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parallel: Any) -> Tensor:
        made: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=parallel
        )
        return made.flatten(2, 3).type_as(query)

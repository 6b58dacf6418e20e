"""Attention backends: FlashAttention 4 as one of diffusers', and the choice of the fastest one on this machine.

`flash_4` is registered with diffusers, so everything that takes a backend takes it: `set_attention_backend`,
self, cross and image attention, and context parallelism, whose ring needs the log-sum-exp.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    attention_backend,
    dispatch_attention_fn,
)
from torch import Tensor

from disagg_ray.errors import ConfigError

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks

logger = logging.getLogger("disagg_ray")

FLASH_4 = "flash_4"

EXACT = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers", FLASH_4)
"""Attention backends that compute the same sums, none of which is downloaded: what `auto` chooses from."""

COMPUTE_CAPABILITIES = range(8, 13)
"""Major compute capabilities of GPUs for which flash-attn-4 has a kernel."""

REPEATS = 3
"""Timed calls of an attention backend, of which the fastest counts."""


@torch.library.custom_op("disagg_ray::flash_4", mutates_args=(), device_types="cuda")
def flash_4(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return attention (batch, length, heads, dim) and its log-sum-exp (batch, heads, length) in float32."""
    from flash_attn.cute import flash_attn_func

    out, lse = flash_attn_func(query, key, value, softmax_scale=scale, causal=is_causal, return_lse=True)
    return out, lse


@flash_4.register_fake
def _(query: Tensor, _: Tensor, value: Tensor, *__: bool | float | None) -> tuple[Tensor, Tensor]:
    batch, length, heads = query.shape[:3]
    out = query.new_empty(batch, length, heads, value.shape[-1])
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def set_attention(key: str, transformer: Any, backend: str) -> None:
    """Set the attention backend of one model; diffusers alone would make it the default of all others as well.

    Raises:
        ConfigError: the backend does not exist or cannot run here; names `key`.
    """
    try:
        with attention_backend("native"):  # puts the default of the process back
            transformer.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{key}: {backend!r} cannot be used here: {' '.join(str(error).split())}") from error


def check_flash_4(key: str, device: str, dtype: str, head_dim: int) -> None:
    """Run FlashAttention 4 once on a few tokens, so that what it lacks here shows before weights are loaded.

    Raises:
        ConfigError: the package, a GPU with a kernel, or a precision that it knows is missing; names `key`.
    """
    missing = _missing_flash_4(device, dtype)
    if missing is not None:
        raise ConfigError(f"invalid {key}={FLASH_4}: {missing}; write auto, or null for torch's own choice")
    tokens = torch.zeros(1, 128, 1, head_dim, device=device, dtype=getattr(torch, dtype))
    try:
        flash_4(tokens, tokens, tokens, False, None)
    except Exception as error:  # its compiler raises every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"invalid {key}={FLASH_4}: the kernel does not run on this GPU: {reason}") from error


def check_shared_attention(key: str, backend: str, device: str) -> None:
    """Refuse a backend with which ranks cannot share a video's tokens.

    Raises:
        ConfigError: names `key`.
    """
    if not _shares_tokens(backend, device):
        known = ", ".join(name for name in EXACT if _shares_tokens(name, device))
        raise ConfigError(
            f"invalid {key}={backend}: ranks that share tokens (parallel.ulysses) cannot use it on {device}; "
            f"write one of auto, {known}"
        )


def fastest_attention(transformer: Any, sizes: Sequence[Tensor], text_tokens: int, ranks: Ranks | None = None) -> str:
    """Time each exact backend on one block's self and cross attention, and return the fastest in all.

    `sizes` are latents (1, channels, frames, height, width) on the transformer's device. Of `ranks`, each times those
    that can share tokens on what it will compute, and all return what the first one found.
    """
    num_shards = 1 if ranks is None else ranks.parallel.num_shards
    inputs = [qkv for size in sizes for qkv in _inputs(transformer, size, text_tokens, num_shards)]
    device = sizes[0].device.type
    seconds: dict[str, float] = {}
    for backend in EXACT if num_shards == 1 else [name for name in EXACT if _shares_tokens(name, device)]:
        if backend == FLASH_4 and _missing_flash_4(device, str(transformer.dtype).split(".")[1]):
            continue
        try:
            set_attention("", transformer, backend)
            seconds[backend] = sum(_seconds(AttentionBackendName(backend), *qkv) for qkv in inputs)
        except Exception as error:  # noqa: BLE001 - libraries raise every kind where they have no kernel
            logger.debug("attention %s: %s", backend, error)
    fastest = min(seconds, key=lambda name: seconds[name])
    if ranks is not None:
        fastest = EXACT[ranks.agree(EXACT.index(fastest))]
    logger.info("attention: %s of %s", fastest, {name: f"{s * 1e3:.2f} ms" for name, s in seconds.items()})
    return fastest


def _shares_tokens(backend: str, device: str) -> bool:
    """Whether ranks can share tokens with it: of those that diffusers says so of, most then call kernels of GPUs."""
    known = backend in _AttentionBackendRegistry._supports_context_parallel
    return known and (device != "cpu" or backend == "native")


def _inputs(transformer: Any, size: Tensor, text_tokens: int, num_shards: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return queries, keys and values of a rank's part of a block's self attention and of its cross attention.

    Ranks share heads in self attention, and tokens in cross attention.
    """
    heads, dim = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    patch = transformer.config.patch_size
    patch = (1, patch, patch) if isinstance(patch, int) else patch
    length = int((torch.tensor(size.shape[2:]) // torch.tensor(patch)).prod())
    query, key, value = torch.randn(3, 1, length, heads, dim, device=size.device, dtype=transformer.dtype)
    own = (part[:, :, : heads // num_shards] for part in (query, key, value))
    query, key, value = query[:, : length // num_shards], key[:, :text_tokens], value[:, :text_tokens]
    return [tuple(own), (query, key, value)]


def _seconds(backend: AttentionBackendName, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Return the least seconds of one attention."""

    def now() -> float:
        if query.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(REPEATS + 1):  # the first one compiles
        started = now()
        dispatch_attention_fn(query, key, value, backend=backend)
        times.append(now() - started)
    return min(times[1:])


def _missing_flash_4(device: str, dtype: str) -> str | None:
    """Return what keeps FlashAttention 4 from running here; None: nothing that is known without running it."""
    if device != "cuda":
        return "it needs a GPU"
    if dtype not in ("bfloat16", "float16"):
        return f"it needs bfloat16 or float16, and the transformer is in {dtype}"
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return 'the package flash-attn-4 is not installed here: pip install "disagg-ray[flash4]"'
    major, minor = torch.cuda.get_device_capability()
    if major not in COMPUTE_CAPABILITIES:
        return f"it has no kernel for {torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    return None


def _flash_4_forward(
    _: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend without gradients; with `return_lse`, also return the log-sum-exp (batch, length, heads)."""
    if attn_mask is not None or dropout_p or enable_gqa:
        raise ValueError("flash_4 knows neither masks, dropout nor grouped queries")
    out, lse = flash_4(query, key, value, is_causal, scale)
    return (out, lse.transpose(1, 2)) if return_lse else out


def _backward(*_: Any) -> None:
    raise NotImplementedError("flash_4 computes no gradients here")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """Compute diffusers' attention with FlashAttention 4: what its registry calls."""
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
    if _parallel_config is None:
        return _flash_4_forward(None, query, key, value, *options)
    return _templated_context_parallel_attention(
        query, key, value, *options,
        forward_op=_flash_4_forward, backward_op=_backward, _parallel_config=_parallel_config,
    )  # fmt: skip


def _register() -> None:
    """Add the backend to diffusers' list of names, which has no public way in, and to its registry."""
    name = str.__new__(AttentionBackendName, FLASH_4)
    name._name_, name._value_ = FLASH_4.upper(), FLASH_4
    AttentionBackendName._member_map_[name.name] = name
    AttentionBackendName._value2member_map_[name.value] = name
    _AttentionBackendRegistry.register(name, supports_context_parallel=True)(_attend)


_register()

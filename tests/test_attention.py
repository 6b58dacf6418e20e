"""FlashAttention 4 as a backend of diffusers; its kernel needs a GPU (tests/gpu), so another computes its sums here."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.errors import ConfigError
from disagg_ray.models import attention
from disagg_ray.models.attention import (
    FLASH_4,
    check_flash_4,
    check_shared_attention,
    fastest_attention,
    set_attention,
)
from disagg_ray.models.wan.fusing import FusedGelu, fuse_rotary
from disagg_ray.models.wan.random import build_random
from disagg_ray.models.wan.shapes import get_shape


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """Register plain sums as the operator's kernel for CPUs."""

    def attend(query, key, value, is_causal, scale):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), scores.logsumexp(-1).float()

    with torch.library._scoped_library("disagg_ray", "FRAGMENT") as library:
        torch.library.register_kernel("disagg_ray::flash_4", "cpu", attend, lib=library)
        yield


def forward(transformer: torch.nn.Module) -> torch.Tensor:
    config, draw = transformer.config, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 3, 8, 8, generator=draw),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim, generator=draw),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 17, config.image_dim, generator=draw)
    with torch.inference_mode():
        return transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("shape", ["tiny-t2v", "tiny-i2v"])
@pytest.mark.parametrize("compiled", [False, True])
def test_self_cross_and_image_attention_take_it_and_compile_in_one_graph(shape: str, compiled: bool) -> None:
    transformer = build_random(get_shape(shape).transformer, "float32", "cpu")
    expected = forward(transformer)
    set_attention("", transformer, FLASH_4)
    names = {m.processor._attention_backend for m in transformer.modules() if hasattr(m, "processor")}
    if compiled:
        for block in transformer.blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    assert names == {FLASH_4}
    torch.testing.assert_close(forward(transformer), expected, rtol=0.1, atol=1e-2)  # the CPU computes GELU exactly


def test_the_log_sum_exp_comes_with_it_when_it_is_asked_for() -> None:
    query, key, value = torch.randn(3, 1, 5, 2, 8).unbind()
    options = {"backend": AttentionBackendName(FLASH_4), "attention_kwargs": {"return_lse": True}}
    _, lse = dispatch_attention_fn(query, key, value, **options)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_masks_are_refused() -> None:
    query, key, value = torch.randn(3, 1, 5, 2, 8).unbind()
    with pytest.raises(ValueError, match="masks"):
        dispatch_attention_fn(query, key, value, torch.ones(5, 5), backend=AttentionBackendName(FLASH_4))


def test_where_it_cannot_run_it_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"^invalid stages\.t\.denoiser\.attention=flash_4: it needs a GPU; write"):
        check_flash_4("stages.t.denoiser.attention", "cpu", "bfloat16", 128)
    with pytest.raises(ConfigError, match="needs bfloat16 or float16, and the transformer is in float32"):
        check_flash_4("stages.t.denoiser.attention", "cuda", "float32", 128)


@pytest.mark.parametrize("shape", ["tiny-t2v", "tiny-i2v"])
def test_the_fused_rotary_embedding_equals_stock_s(shape: str) -> None:
    transformer = build_random(get_shape(shape).transformer, "float32", "cpu")
    expected = forward(transformer)
    fuse_rotary(transformer)
    torch.testing.assert_close(forward(transformer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_fused_blocks_are_compiled_once_for_all_of_them() -> None:
    transformer = build_random(replace(get_shape("tiny-t2v").transformer, num_layers=10), "float32", "cpu")
    expected = forward(transformer)
    fuse_rotary(transformer)
    for block in transformer.blocks:
        block.ffn.net[0].__class__ = FusedGelu  # as fuse_activation does on a GPU
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    torch._dynamo.reset()  # what other tests compiled counts too
    with torch._dynamo.config.patch(recompile_limit=1):
        torch.testing.assert_close(forward(transformer), expected, rtol=0.1, atol=1e-2)  # the CPU computes GELU exactly


def test_ranks_that_share_tokens_on_cpus_choose_what_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, torch's flash attention runs on a CPU as well; what diffusers calls of it for ranks does not."""
    ranks = SimpleNamespace(parallel=ParallelConfig(ulysses=2), agree=lambda number: number)
    monkeypatch.setattr(attention, "_seconds", lambda backend, *_: float(backend.value == "native"))
    transformer = build_random(get_shape("tiny-t2v").transformer, "float32", "cpu")
    latents = [torch.zeros(1, 4, 3, 8, 8)]
    assert fastest_attention(transformer, latents, 16) != "native"
    assert fastest_attention(transformer, latents, 16, ranks) == "native"


@pytest.mark.parametrize(("backend", "device"), [("_native_flash", "cpu"), ("_native_efficient", "cuda")])
def test_what_ranks_cannot_share_tokens_with_is_refused_by_key(backend: str, device: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^invalid stages\.t\.a={backend}: ranks .* cannot use it on {device}; write"
    ):
        check_shared_attention("stages.t.a", backend, device)
    check_shared_attention("stages.t.a", "native", device)

"""FlashAttention 4 on a GPU: alone, compiled, with a LoRA, and in both transformers of Wan 2.2."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from safetensors.torch import save_file
from torch import Tensor

from disagg_ray.config.options import DenoiserConfig, LoraConfig
from disagg_ray.models.attention import FLASH_4, check_flash_4
from disagg_ray.models.tuning import tune_transformer
from disagg_ray.models.wan.random import build_random
from disagg_ray.models.wan.shapes import get_shape

WIDTH = 256
SHAPES = {
    "tiny-t2v": replace(get_shape("tiny-t2v").transformer, attention_head_dim=128, num_layers=10),
    "tiny-i2v": replace(get_shape("tiny-i2v").transformer, attention_head_dim=128, added_kv_proj_dim=WIDTH),
}
"""Of two heads, as wide as the published models'."""
TRANSFORMERS = ("transformer", "transformer_2")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn-4"),
]


def forward(shape: str, options: DenoiserConfig, name: str = "transformer") -> Tensor:
    """Return what random weights make of seeded inputs, with the options of a stage."""
    transformer = build_random(SHAPES[shape], "bfloat16", "cuda")
    tune_transformer("denoiser", name, transformer, options, [], 512)
    config, draw = transformer.config, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 3, 32, 32, generator=draw),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim, generator=draw),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 17, config.image_dim, generator=draw)
    inputs = {key: value.to("cuda", torch.bfloat16) for key, value in inputs.items()}
    with torch.inference_mode():
        made: Tensor = transformer(**inputs, timestep=torch.tensor([700], device="cuda"), return_dict=False)[0]
    return made.float()


def assert_close(made: Tensor, expected: Tensor) -> None:
    assert float((made - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_and_log_sum_exp_equal_plain_sums(head_dim: int) -> None:
    check_flash_4("attention", "cuda", "bfloat16", head_dim)
    query, key, value = torch.randn(3, 1, 300, 4, head_dim, device="cuda", dtype=torch.bfloat16).unbind()
    options = {"backend": AttentionBackendName(FLASH_4), "attention_kwargs": {"return_lse": True}}
    made, lse = dispatch_attention_fn(query, key, value, **options)
    scores = torch.einsum("bqhd,bkhd->bqhk", query.float(), key.float()) * head_dim**-0.5
    assert_close(made.float(), torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value.float()))
    assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compile_mode", [None, "default"])
@pytest.mark.parametrize("fuse", [False, True])
def test_self_cross_and_image_attention_are_close_to_stock_s(shape: str, compile_mode: str | None, fuse: bool) -> None:
    made = forward(shape, DenoiserConfig(attention=FLASH_4, compile=compile_mode, fuse=fuse))
    assert_close(made, forward(shape, DenoiserConfig()))


def test_both_transformers_take_it_with_a_lora_of_their_own(tmp_path: Path) -> None:
    loras = []
    for seed, name in enumerate(TRANSFORMERS):
        draw, path = torch.Generator().manual_seed(seed), tmp_path / f"{name}.safetensors"
        factors = {"A": torch.randn(4, WIDTH, generator=draw), "B": torch.randn(WIDTH, 4, generator=draw)}
        save_file({f"transformer.blocks.0.attn1.to_q.lora_{n}.weight": t for n, t in factors.items()}, path)
        loras.append(LoraConfig(path=str(path), transformer=name))
    for name in TRANSFORMERS:
        options = DenoiserConfig(loras=loras)
        fast = replace(options, attention=FLASH_4, compile="default", fuse=True)
        assert_close(forward("tiny-t2v", fast, name), forward("tiny-t2v", options, name))

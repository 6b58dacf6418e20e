"""LoRA files: what stock loads is loaded alike, what it leaves out is named, and what it would make up is refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from disagg_ray import CheckpointError, Pipeline, load_config
from disagg_ray.config.options import LoraConfig
from disagg_ray.models.lora import load_loras
from disagg_ray.models.lora_files import check_loras

CONF = Path(__file__).parents[1] / "conf" / "tiny_t2v.yaml"
Weights = dict[str, torch.Tensor]
TO_Q = "transformer.blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def transformer(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """Give a tiny model's transformer, loaded anew."""
    kind = diffusers.WanTransformer3DModel
    return lambda shape="tiny-t2v": kind.from_pretrained(checkpoint(shape), subfolder="transformer")


def factors(prefix: str, rank: int = 4, width: int = 48, seed: int = 0, names: str = "AB") -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, width), "B": (width, rank), "down": (rank, width), "up": (width, rank)}
    pair = ("A", "B") if names == "AB" else ("down", "up")
    return {f"{prefix}.lora_{name}.weight": torch.randn(shapes[name], generator=generator) for name in pair}


def load(transformer: Any, folder: Path, weights: Weights, metadata: dict[str, str] | None = None) -> Any:
    save_file(weights, folder / "lora.safetensors", metadata)
    load_loras("loras", transformer, [LoraConfig(path=str(folder / "lora.safetensors"))])
    return transformer


def refusal(transformer: Any, folder: Path, weights: Weights, metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(transformer, folder, weights, metadata)
    assert str(caught.value).startswith("loras: ")
    assert str(folder / "lora.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not getattr(transformer, "peft_config", {}), "a refused file left something behind"
    return str(caught.value)


def same(ours: Any, stock: Any) -> bool:
    """Return whether two transformers hold the same weights and scales."""
    pairs = zip(ours.state_dict().items(), stock.state_dict().items(), strict=True)
    scales = [[m.scaling for m in t.modules() if hasattr(m, "scaling")] for t in (ours, stock)]
    alike = all(a.split(".")[:-2] == b.split(".")[:-2] and torch.equal(x, y) for (a, x), (b, y) in pairs)
    return alike and [list(s.values()) for s in scales[0]] == [list(s.values()) for s in scales[1]]


def stock(transformer: Any, weights: Weights) -> Any:
    """Return a transformer into which stock's pipeline has loaded a LoRA."""
    pipeline = diffusers.WanPipeline(None, None, None, diffusers.UniPCMultistepScheduler(), transformer)
    pipeline.load_lora_weights(dict(weights), adapter_name="a")
    pipeline.set_adapters(["a"], [1.0])
    return transformer


def test_a_2_1_image_lora_is_loaded_into_a14b_as_stock_does(
    transformer: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "disagg_ray")
    weights = factors(TO_Q) | factors("transformer.blocks.0.attn2.add_k_proj", rank=8, seed=1)
    weights |= factors("transformer.blocks.0.attn2.add_v_proj", rank=8, seed=2)
    weights |= factors("transformer.condition_embedder.image_embedder.ff.net.2", seed=3)
    ours = load(transformer("tiny-a14b-i2v"), tmp_path, weights)
    assert same(ours, stock(transformer("tiny-a14b-i2v"), weights))
    assert "2 of its 8 keys take effect" in caplog.text
    assert "add_k_proj" in caplog.text


def test_keys_that_stock_leaves_out_are_counted_and_named(
    transformer: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "disagg_ray")
    weights = factors("diffusion_model.blocks.0.self_attn.q", names="down, up")
    weights |= {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0)}
    weights |= {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(48)}
    dropped = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(48),
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(48),
        "diffusion_model.blocks.0.modulation.diff": torch.ones(1, 6, 48),
        "diffusion_model.patch_embedding.diff": torch.ones(48, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.diff_b": torch.ones(48),
    }
    ours = load(transformer(), tmp_path, weights | dropped)
    assert same(ours, stock(transformer(), weights | dropped))
    assert "4 of its 9 keys take effect" in caplog.text
    assert ".diff" in caplog.text


def test_a_file_whose_keys_all_count_says_so(
    transformer: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "disagg_ray")
    load(transformer(), tmp_path, factors(TO_Q))
    assert "all of its 2 keys take effect" in caplog.text


def test_keys_without_a_prefix_are_counted(transformer: Callable[..., Any], tmp_path: Path) -> None:
    message = refusal(transformer(), tmp_path, factors("blocks.0.attn1.to_q"))
    assert "2 of its 2 keys begin with none of transformer., diffusion_model., lora_unet_" in message
    assert "blocks.0.attn1.to_q.lora_A.weight" in message


UNFIT: dict[str, tuple[Weights, str]] = {
    "only B": ({f"{TO_Q}.lora_B.weight": torch.ones(48, 4)}, f"without '{TO_Q}.lora_A.weight'"),
    "only A": (factors(TO_Q) | {"transformer.blocks.1.attn1.to_k.lora_A.weight": torch.ones(4, 48)}, "without"),
    "only a bias": ({f"{TO_Q}.lora_B.bias": torch.ones(48)}, "without"),
    "an unknown layer": (factors(TO_Q) | factors("transformer.blocks.0.attn9.to_q"), "2 match no layer"),
    "an unknown end": (factors(TO_Q) | {f"{TO_Q}.weight": torch.ones(48, 48)}, "1 match no layer"),
    "another model": (factors(TO_Q) | factors("unet.down.to_q"), "2 of its 4 keys begin with none of"),
    "whole numbers": ({key: value.to(torch.int32) for key, value in factors(TO_Q).items()}, "of I32 [4, 48]"),
    "no number": (factors(TO_Q) | {f"{TO_Q}.lora_A.weight": torch.full((4, 48), float("nan"))}, "not finite"),
    "infinite": (factors(TO_Q) | {f"{TO_Q}.lora_A.weight": torch.full((4, 48), float("inf"))}, "not finite"),
    "empty": (factors(TO_Q) | {f"{TO_Q}.lora_A.weight": torch.ones(0, 48)}, "[0, 48]"),
    "no tensors": ({}, "0 of its 0 keys"),
    "no blocks": ({"diffusion_model.x.lora_A.weight": torch.ones(4, 4)}, "cannot be read as a LoRA"),
    "a huge block": (factors("diffusion_model.blocks.999999999999.self_attn.q"), "no layer has the number"),
    "a negative scale": (
        factors("diffusion_model.blocks.0.self_attn.q", names="down, up")
        | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(-1.0)}, "no scale",
    ),
    "another width": (factors(TO_Q, width=47), "cannot be loaded"),
    "another rank": (factors(TO_Q) | {f"{TO_Q}.lora_A.weight": torch.ones(3, 48)}, "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_files_are_refused_in_a_line(transformer: Callable[..., Any], tmp_path: Path, case: str) -> None:
    weights, says = UNFIT[case]
    assert says in refusal(transformer(), tmp_path, weights)


def test_an_unfit_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    loras = f"stages.transformer.denoiser.loras=[{{path: {file}}}]"
    joined = ray.is_initialized()  # by other tests
    for content, says in ((None, "is no file"), (b"pickle", "no safetensors file")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^stages\.transformer\.denoiser\.loras: .*{says}"):
            Pipeline.from_config(CONF, loras)
        assert ray.is_initialized() == joined
    file.unlink()
    check_loras(load_config(CONF, loras), whole=False)  # it may be on another machine


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 1e400}', '{"transformer.r": 99999999999}', "[" * 100_000])
def test_unfit_metadata_is_refused_in_a_line(transformer: Callable[..., Any], tmp_path: Path, text: str) -> None:
    refusal(transformer(), tmp_path, factors(TO_Q), {"lora_adapter_metadata": text})


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"[]", b"\x80\x04pickle."])
def test_files_of_another_kind_are_refused_in_a_line(
    transformer: Callable[..., Any], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a LoRA: no safetensors file"):
        load_loras("loras", transformer(), [LoraConfig(path=str(file))])


ODD_KEYS = [
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
    "diffusion_model.blocks.0.self_attn.q.alpha",
    "diffusion_model.blocks.x.diff",
    "diffusion_model.head.head.diff",
    "diffusion_model.time_embedding.0.diff_b",
    "diffusion_model.blocks.-1.ffn.0.alpha",
    "lora_unet_",
    "transformer.",
    "lora_unet_blocks_0_ffn_0.alpha",
    "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "transformer.proj_out.lora_A.weight",
    "transformer.blocks.0.norm2.lora_A.weight",
    "transformer.blocks.0.norm2.lora_B.weight",
    "dora_scale",
]
ENDS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha", "lora_down.weight")
KEYS = st.sampled_from((*ODD_KEYS, *(f"{TO_Q}.{end}" for end in ENDS), "")) | st.text(max_size=20)
TENSORS = st.tuples(
    st.sampled_from(("F32", "BF16", "I64", "BOOL", "F8_E4M3", "F31", 3, None)),
    st.lists(st.sampled_from((0, 1, 4, 48, -1, 2**62, "4")), max_size=3),
    st.sampled_from((0, 1, None)),
)


@pytest.mark.proof
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEYS, TENSORS, max_size=6), st.binary(max_size=64), st.sampled_from((None, 0, 2**63, 2**64 - 1)))
def test_no_lora_file_raises_anything_but_a_line(
    transformer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    tensors: Any,
    data: bytes,
    length: int | None,
) -> None:
    sizes = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1, "F8_E4M3": 1}
    header: dict[str, Any] = {}
    position = 0
    for key, (dtype, shape, shift) in tensors.items():
        fair = dtype in sizes and all(type(number) is int and 0 <= number <= 48 for number in shape)
        nbytes = sizes[dtype] * int(np.prod(shape)) if fair else 4
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position + (shift or 0), position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    body = (data * (position // max(1, len(data)) + 1))[:position].ljust(position, b"\0")
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    try:
        load_loras("loras", FUZZED.setdefault("transformer", transformer()), [LoraConfig(path=str(file))])
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        FUZZED.clear()


FUZZED: dict[str, Any] = {}
"""The transformer that files are tried on, until one fits."""

"""Shapes and the checkpoints made of them, against the stock diffusers pipelines."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from disagg_ray.errors import OutputError
from disagg_ray.models import random
from disagg_ray.models.random import make_checkpoint
from disagg_ray.models.wan.random import build_meta, make_tokenizer
from disagg_ray.models.wan.shapes import SHAPES, get_shape

TINY = [name for name in SHAPES if name.startswith("tiny-")]
PUBLISHED = [name for name in SHAPES if not name.startswith("tiny-")]

GRADIENT = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
CHECKERS = Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2 * 255, np.ones((8, 8))).astype(np.uint8)).convert(
    "RGB"
)


@dataclass
class Stock:
    """A tiny checkpoint in the stock pipeline."""

    name: str
    folder: Path
    pipeline: Any
    baseline: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.baseline = self.generate()

    def generate(self, prompt: str = "a red circle moving left", seed: int = 7, **images: Image.Image) -> np.ndarray:
        if get_shape(self.name).takes_image:
            images.setdefault("image", GRADIENT)
        if get_shape(self.name).takes_last_image:
            images.setdefault("last_image", CHECKERS)
        frames = self.pipeline(
            prompt=prompt,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=4,
            generator=torch.Generator("cpu").manual_seed(seed),
            **images,
        ).frames[0]
        assert isinstance(frames, np.ndarray)
        return frames

    def change(self, **request: Any) -> float:
        """How far the frames move, a mean over values in [0, 1], when the request differs so."""
        return float(np.abs(self.generate(**request) - self.baseline).mean())


@pytest.fixture(scope="module", params=TINY)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp("made") / request.param)
    pipeline = getattr(diffusers, get_shape(request.param).pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return Stock(request.param, folder, pipeline)


def bytes_by_path(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_frames_are_finite_and_vary_in_time_and_space(stock: Stock) -> None:
    frames = stock.baseline
    assert frames.shape == (9, 64, 64, 3)
    assert np.isfinite(frames).all()
    assert 0.3 < frames.mean() < 0.7
    for axis in range(3):
        assert np.abs(np.diff(frames, axis=axis)).mean() > 0.02


def test_frames_repeat_for_the_same_request(stock: Stock) -> None:
    assert stock.change() == 0.0


def test_frames_depend_on_the_prompt(stock: Stock) -> None:
    assert stock.change(prompt="a blue square moving right") > 0.005


def test_frames_depend_on_the_seed(stock: Stock) -> None:
    assert stock.change(seed=8) > 0.05


def test_frames_depend_on_the_images(stock: Stock) -> None:
    shape = get_shape(stock.name)
    if shape.takes_image:
        assert stock.change(image=CHECKERS) > 0.005
    if shape.takes_last_image:
        assert stock.change(last_image=GRADIENT) > 0.005


def test_every_transformer_takes_part(stock: Stock) -> None:
    used = set()
    transformers = {name: getattr(stock.pipeline, name) for name in ("transformer", "transformer_2")}
    present = {name: module for name, module in transformers.items() if module is not None}
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: used.add(name)) for name, m in present.items()]
    stock.generate()
    for hook in hooks:
        hook.remove()
    assert used == set(present)
    assert len(used) == (2 if get_shape(stock.name).transformer_2 else 1)


def test_checkpoint_is_small_and_only_safetensors(stock: Stock) -> None:
    files = [path for path in stock.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_index_is_what_the_stock_pipeline_writes(stock: Stock, tmp_path: Path) -> None:
    stock.pipeline.save_config(tmp_path)
    made, rewritten = (json.loads((folder / "model_index.json").read_text()) for folder in (stock.folder, tmp_path))
    if get_shape(stock.name).image_encoder:
        assert made.pop("image_processor") == ["transformers", "CLIPImageProcessor"]
        del rewritten["image_processor"]  # its class depends on whether torchvision is installed
    del rewritten["_name_or_path"]
    assert made == rewritten


def test_tiny_vae_has_the_published_scale_factors(stock: Stock) -> None:
    published, spatial = ("wan2.2-ti2v-5b", 16) if stock.name == "tiny-ti2v" else ("wan2.1-t2v-14b", 8)
    assert (stock.pipeline.vae_scale_factor_spatial, stock.pipeline.vae_scale_factor_temporal) == (spatial, 4)
    assert stock.pipeline.vae.config.latents_std == list(get_shape(published).vae.latents_std)


def test_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, second, other = (
        bytes_by_path(make_checkpoint("tiny-a14b-i2v", tmp_path / name, seed=seed))
        for name, seed in (("first", 3), ("second", 3), ("other", 4))
    )
    assert first == second
    changed = {path for path in first if first[path] != other[path]}
    assert changed == {path for path in first if path.endswith(".safetensors")} | {random.RECORD_FILE}


def test_two_transformers_have_weights_of_their_own(tmp_path: Path) -> None:
    files = bytes_by_path(make_checkpoint("tiny-a14b-t2v", tmp_path / "made"))
    weights = "diffusion_pytorch_model.safetensors"
    assert files[f"transformer/{weights}"] != files[f"transformer_2/{weights}"]


def test_dtype_is_that_of_every_weight(tmp_path: Path) -> None:
    folder = make_checkpoint("tiny-i2v", tmp_path / "made", dtype="bfloat16")
    weights = [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights)


def test_finished_checkpoint_is_reused(tmp_path: Path) -> None:
    folder = make_checkpoint("tiny-t2v", tmp_path / "made")
    inode = (folder / "vae" / "config.json").stat().st_ino
    assert make_checkpoint("tiny-t2v", folder) == folder
    assert (folder / "vae" / "config.json").stat().st_ino == inode


def test_folder_of_anything_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        make_checkpoint("tiny-t2v", tmp_path)
    make_checkpoint("tiny-t2v", tmp_path / "made")
    with pytest.raises(FileExistsError, match="'seed': 0"):
        make_checkpoint("tiny-t2v", tmp_path / "made", seed=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(random, "_write_index", fail)
    with pytest.raises(OutputError, match=r"'.*/made' could not be written: disk full; make room"):
        make_checkpoint("tiny-t2v", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_left_empty(small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"'.*/made' could not be written: .*No space left.*; make room"):
        make_checkpoint("tiny-t2v", small_disk / "made")
    assert list(small_disk.iterdir()) == []


def test_slower_of_two_makers_keeps_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index = random._write_index

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(random, "_write_index", write_index)
        make_checkpoint("tiny-t2v", tmp_path / "made")
        write_index(*arguments)

    monkeypatch.setattr(random, "_write_index", overtaken)
    assert make_checkpoint("tiny-t2v", tmp_path / "made") == tmp_path / "made"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_unknown_names_are_answered_with_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model shape 'wan2.2-t2v-a14'; known: .*; did you mean wan2.2-t2v-a14b\?"):
        make_checkpoint("wan2.2-t2v-a14", tmp_path / "made")
    with pytest.raises(ValueError, match="no weight dtype 'int8': one of float32, bfloat16, float16"):
        make_checkpoint("tiny-t2v", tmp_path / "made", dtype="int8")


@pytest.mark.parametrize("text", ["a red circle", "红色的圆 移动", "emoji 😀 and é", "</unfinished> {x}", ""])
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer(text).input_ids
    assert tokens[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_tokenizer_pads_and_truncates_as_t5_does(stock: Stock) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stock.folder / "tokenizer")
    short, long = tokenizer(["ab", "x" * 99], padding="max_length", max_length=8, truncation=True).input_ids
    assert short[-4:] == [0, 0, 0, 0]
    assert 0 not in long
    assert long[-1] == 1
    assert tokenizer.model_max_length == 512


def test_tokenizer_fits_every_text_encoder() -> None:
    assert len(make_tokenizer()) <= min(shape.text_encoder.vocab_size for shape in SHAPES.values())


# Billions of parameters; in bf16 twice as many GB: 1.3B 2.8, 14B 28.6, I2V-14B 32.8.
PUBLISHED_BILLIONS = {
    "wan2.1-t2v-1.3b": {"transformer": 1.419},
    "wan2.1-t2v-14b": {"transformer": 14.288},
    "wan2.1-i2v-14b-480p": {"transformer": 16.395, "image_encoder": 0.631},
    "wan2.1-i2v-14b-720p": {"transformer": 16.395, "image_encoder": 0.631},
    "wan2.1-flf2v-14b-720p": {"transformer": 16.396, "image_encoder": 0.631},
    "wan2.2-t2v-a14b": {"transformer": 14.288, "transformer_2": 14.288},
    "wan2.2-i2v-a14b": {"transformer": 14.289, "transformer_2": 14.289},
    "wan2.2-ti2v-5b": {"transformer": 5.000, "vae": 0.7047},
    "wan2.1-vace-1.3b": {"transformer": 2.154},
    "wan2.1-vace-14b": {"transformer": 17.338},
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A published model's name and its components on the meta device."""
    return request.param, dict(build_meta(get_shape(request.param)))


def test_published_models_have_their_published_sizes(published: tuple[str, dict[str, Any]]) -> None:
    name, modules = published
    billions = {component: num_parameters(module) / 1e9 for component, module in modules.items()}
    expected = {"text_encoder": 5.681, "vae": 0.1269, **PUBLISHED_BILLIONS[name]}
    assert billions == pytest.approx(expected, rel=0.001)
    assert all(parameter.is_meta for module in modules.values() for parameter in module.parameters())


# heads, head width, layers, ffn, channels in, text, image, added keys and values, position embeddings
PUBLISHED_GEOMETRY = {
    "wan2.1-t2v-1.3b": (12, 128, 30, 8960, 16, 4096, None, None, None),
    "wan2.1-t2v-14b": (40, 128, 40, 13824, 16, 4096, None, None, None),
    "wan2.1-i2v-14b-480p": (40, 128, 40, 13824, 36, 4096, 1280, 5120, None),
    "wan2.1-i2v-14b-720p": (40, 128, 40, 13824, 36, 4096, 1280, 5120, None),
    "wan2.1-flf2v-14b-720p": (40, 128, 40, 13824, 36, 4096, 1280, 5120, 514),
    "wan2.2-t2v-a14b": (40, 128, 40, 13824, 16, 4096, None, None, None),
    "wan2.2-i2v-a14b": (40, 128, 40, 13824, 36, 4096, None, None, None),
    "wan2.2-ti2v-5b": (24, 128, 30, 14336, 48, 4096, None, None, None),
    "wan2.1-vace-1.3b": (12, 128, 30, 8960, 16, 4096, None, None, None),
    "wan2.1-vace-14b": (40, 128, 40, 13824, 16, 4096, None, None, None),
}


def test_published_transformers_have_their_published_geometry(published: tuple[str, dict[str, Any]]) -> None:
    name, modules = published
    for component in modules.keys() & {"transformer", "transformer_2"}:
        config = modules[component].config
        geometry = (
            config.num_attention_heads,
            config.attention_head_dim,
            config.num_layers,
            config.ffn_dim,
            config.in_channels,
            config.text_dim,
            config.image_dim,
            config.added_kv_proj_dim,
            config.pos_embed_seq_len,
        )
        assert geometry == PUBLISHED_GEOMETRY[name]
        channels = 48 if name == "wan2.2-ti2v-5b" else 16
        assert (config.out_channels, config.freq_dim, config.rope_max_seq_len, config.eps) == (
            channels,
            256,
            1024,
            1e-6,
        )
        assert tuple(config.patch_size) == (1, 2, 2)
        assert (config.qk_norm, config.cross_attn_norm) == ("rms_norm_across_heads", True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_match_their_transformer(name: str) -> None:
    shape = get_shape(name)
    assert shape.transformer.text_dim == shape.text_encoder.d_model
    assert shape.transformer.out_channels == shape.vae.z_dim
    assert (shape.text_encoder.num_heads * shape.text_encoder.d_kv, shape.text_encoder.vocab_size) == (4096, 256384)
    if shape.image_encoder:
        assert shape.transformer.image_dim == shape.image_encoder.hidden_size
        assert shape.image_encoder.num_tokens == 257
    if shape.takes_last_image:
        assert shape.image_encoder is not None
        assert shape.transformer.pos_embed_seq_len == 2 * shape.image_encoder.num_tokens


def test_saved_schedules_and_boundaries_are_the_published_ones() -> None:
    found = {name: (get_shape(name).scheduler.flow_shift, get_shape(name).boundary_ratio) for name in PUBLISHED}
    assert found == {
        "wan2.1-t2v-1.3b": (3.0, None),
        "wan2.1-t2v-14b": (3.0, None),
        "wan2.1-i2v-14b-480p": (3.0, None),
        "wan2.1-i2v-14b-720p": (5.0, None),
        "wan2.1-flf2v-14b-720p": (16.0, None),
        "wan2.2-t2v-a14b": (3.0, 0.875),
        "wan2.2-i2v-a14b": (3.0, 0.9),
        "wan2.2-ti2v-5b": (5.0, None),
        "wan2.1-vace-1.3b": (3.0, None),
        "wan2.1-vace-14b": (3.0, None),
    }


def test_the_vae_of_ti2v_5b_is_the_published_one() -> None:
    """Source: `vae/config.json` of Wan-AI/Wan2.2-TI2V-5B-Diffusers."""
    vae = get_shape("wan2.2-ti2v-5b").vae
    assert (vae.z_dim, vae.base_dim, vae.decoder_base_dim, vae.in_channels, vae.out_channels) == (48, 160, 256, 12, 12)
    assert (vae.patch_size, vae.is_residual, vae.scale_factor_spatial, vae.scale_factor_temporal) == (2, True, 16, 4)
    assert (len(vae.latents_mean), vae.latents_mean[0], vae.latents_mean[-1]) == (48, -0.2289, -0.0667)
    assert (len(vae.latents_std), vae.latents_std[0], vae.latents_std[-1]) == (48, 0.4765, 0.7744)

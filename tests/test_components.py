"""Only the files a family expects are opened: safetensors, of the model's own folder, whole, and none of its code."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from disagg_ray import CheckpointError, LocalPipeline, Pipeline
from disagg_ray.config.model import ModelConfig
from disagg_ray.models.checkpoint import check_here, open_checkpoint
from disagg_ray.models.families import FAMILIES
from disagg_ray.models.files import read_header
from disagg_ray.models.load import load_component

CONF = Path(__file__).parent.parent / "conf" / "tiny_t2v.yaml"
KINDS = FAMILIES["wan"].components
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """Give a copy of a text-to-video checkpoint to break."""
    return Path(shutil.copytree(checkpoint("tiny-t2v"), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, or make it."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def index_of(component: Path, shard: str) -> None:
    """Have a component's weights be looked for in a file."""
    (component / WEIGHTS).unlink()
    edit(component / f"{WEIGHTS}.index.json", weight_map={"a": shard}, metadata={"total_size": 1})


def refusal(folder: Path) -> str:
    """Return the line with which a folder is refused before anything starts."""
    with pytest.raises(CheckpointError) as caught:
        check_here(ModelConfig(path=str(folder)), whole=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def with_header(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def test_variants_beside_the_weights_are_not_counted(folder: Path) -> None:
    checkpoint = open_checkpoint(ModelConfig(path=str(folder)))
    plain = {name: checkpoint.count_parameters(name) for name in checkpoint.components}
    for path in [*folder.glob("*/*.safetensors")]:
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
        shutil.copy(path, path.with_name("ema.safetensors"))
    assert {name: checkpoint.count_parameters(name) for name in checkpoint.components} == plain
    assert plain["transformer"] > 0


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../x.safetensors", "/etc/x.safetensors", 3, None, "x.pt"])
def test_an_index_of_other_files_is_refused(folder: Path, shard: Any) -> None:
    index_of(folder / "vae", shard)
    assert f"{WEIGHTS}.index.json" in refusal(folder)


def test_missing_shards_are_refused_by_name(folder: Path) -> None:
    index_of(folder / "vae", "part-1.safetensors")
    assert "part-1.safetensors' is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["vae/config.json", f"vae/{WEIGHTS}", "tokenizer/tokenizer.json", "model_index.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "outside of the model's folder" in refusal(folder)


def test_links_into_the_blobs_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "0123abc", tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    check_here(ModelConfig(path=str(snapshot)), whole=True)
    with LocalPipeline.from_config(CONF, f"model.path={snapshot}") as pipeline:
        assert pipeline.weights["decoder"]["vae"] > 0


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("text_encoder", ["transformers", "AutoModel"]),
        ("text_encoder", ["transformers", "GPT2Model"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("vae", ["diffusers", "AutoModel"]),
        ("transformer", ["evil", "WanTransformer3DModel"]),
        ("scheduler", ["diffusers", "DPMSolverSDEScheduler"]),
        ("scheduler", ["diffusers", "os.Scheduler"]),
        ("scheduler", "UniPCMultistepScheduler"),
        ("vae", ["diffusers"]),
        ("vae", [1, 2]),
    ],
)
def test_classes_that_the_family_does_not_expect_are_refused(folder: Path, name: str, entry: Any) -> None:
    edit(folder / "model_index.json", **{name: entry})
    assert "model_index.json" in refusal(folder)


def test_a_scheduler_that_is_not_there_is_refused_by_name(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(CheckpointError, match="NoSuchScheduler"):
        LocalPipeline.from_config(CONF, f"model.path={folder}")


def test_a_modular_index_is_never_read(folder: Path) -> None:
    edit(
        folder / "modular_model_index.json",
        vae=["diffusers", "AutoModel", {"repo": "evil/repo", "subfolder": "x", "type_hint": ["evil", "Code"]}],
        auto_map={"ModularPipelineBlocks": "code.Blocks"},
    )
    with LocalPipeline.from_config(CONF, f"model.path={folder}") as pipeline:
        assert type(pipeline.stages[-1].component("vae")).__name__ == "AutoencoderKLWan"


@pytest.mark.parametrize("name", KINDS)
def test_code_of_a_folder_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    shape = "tiny-i2v" if name.startswith("image") else "tiny-a14b-t2v"
    folder = Path(shutil.copytree(checkpoint(shape), tmp_path / "model"))
    edit(folder / name / KINDS[name].config, auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    task = "i2v" if name.startswith("image") else "t2v"
    with pytest.raises(CheckpointError, match="auto_map"):
        check_here(ModelConfig(path=str(folder), task=task), whole=True)


def test_code_of_a_tokenizer_neither_runs_nor_asks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: ...\n")
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="auto_map"):
        LocalPipeline.from_config(CONF, f"model.path={folder}")
    kind = KINDS["tokenizer"]
    load_component(kind, folder, "tokenizer", "PreTrainedTokenizerFast")  # which no check would keep from it
    assert not (tmp_path / "ran").exists()


def test_adapters_and_files_from_elsewhere_are_refused(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", transformers_weights="other.safetensors")
    assert "transformers_weights" in refusal(folder)
    edit(folder / "text_encoder" / "config.json", transformers_weights=None)
    edit(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path="evil/repo")
    assert "adapter_config.json" in refusal(folder)


def test_tensors_that_the_weights_lack_are_never_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "vae" / WEIGHTS)
    del weights["decoder.conv_in.weight"]
    save_file(weights, folder / "vae" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, as 'decoder\.conv_in\.weight'"):
        LocalPipeline.from_config(CONF, f"model.path={folder}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_attention_heads": 4},
            "holds 'scale_shift_table' of shape [1, 2, 48]",
        ),
        ({"num_layers": 3}, "lacks "),
        ({"out_channels": 8}, "holds 'proj_out.weight' of shape [64, 48]"),
    ],
)
def test_weights_that_are_not_the_configuration_s_are_refused_by_tensor(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    edit(folder / "transformer" / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        LocalPipeline.from_config(CONF, f"model.path={folder}")
    assert str(folder / "transformer") in str(caught.value)
    assert says in str(caught.value)


def test_a_scheduler_with_dynamic_shifting_is_refused_before_anything_starts(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    assert "use_dynamic_shifting" in refusal(folder)
    joined = ray.is_initialized()  # by other tests
    with pytest.raises(CheckpointError, match="use_dynamic_shifting"):
        Pipeline.from_config(CONF, f"model.path={folder}")
    assert ray.is_initialized() == joined


def test_a_tokenizer_of_sentencepiece_alone_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")
    assert "sentencepiece" in refusal(folder)


HEADERS: dict[str, tuple[bytes, int | None, bytes]] = {
    "longer than any": (b"{}", 2**63, b""),
    "longer than the file": (b"{}", 3, b""),
    "a list": (b"[]", None, b""),
    "no JSON": (b"{", None, b""),
    "deep": (b"[" * 100_000, None, b""),
    "huge numbers": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', None, b"1234"),
    "no tensor": (b'{"a":3}', None, b""),
    "unknown type": (b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', None, b"1234"),
    "negative": (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', None, b"1234"),
    "offsets": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', None, b"1234"),
    "cut off": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', None, b"123"),
    "a gap": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', None, b"12345678"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_safetensors_are_one_line_with_their_name(folder: Path, case: str) -> None:
    header, length, data = HEADERS[case]
    with_header(folder / "vae" / WEIGHTS, header, length, data)
    assert str(folder / "vae" / WEIGHTS) in refusal(folder)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        open_checkpoint(ModelConfig(path=str(folder))).count_parameters("vae")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transformer/config.json", {"num_layers": "two"}),
        ("transformer/config.json", {"num_layers": 10**9}),
        ("transformer/config.json", {"text_dim": 10**400}),
        ("transformer/config.json", {"text_dim": True}),
        ("transformer/config.json", {"patch_size": [1, 2]}),
        ("transformer/config.json", {"patch_size": 2}),
        ("transformer/config.json", {"eps": float("nan")}),
        ("vae/config.json", {"temperal_downsample": "no"}),
        ("vae/config.json", {"temperal_downsample": [True] * 1000}),
        ("vae/config.json", {"z_dim": None}),
        ("vae/config.json", {"latents_mean": ["0"]}),
        ("text_encoder/config.json", {"d_model": [1]}),
        ("text_encoder/config.json", {"num_layers": {"a": 1}}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("scheduler/scheduler_config.json", {"flow_shift": "three"}),
    ],
)
def test_configurations_of_wrong_values_are_one_line_with_their_name(folder: Path, name: str, content: Any) -> None:
    edit(folder / name, **content)
    message = refusal(folder)
    assert str(folder / name) in message
    assert next(iter(content)) in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transformer/config.json", {"ffn_dim": 95}),
        ("transformer/config.json", {"num_layers": 3}),
        ("vae/config.json", {"dim_mult": []}),
        ("text_encoder/config.json", {"num_heads": 3}),
        ("scheduler/scheduler_config.json", {"solver_type": "none"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": 3}),
        ("tokenizer/tokenizer.json", {"model": 3}),
    ],
)
def test_configurations_that_do_not_make_a_model_are_one_line(folder: Path, name: str, content: Any) -> None:
    edit(folder / name, **content)
    with pytest.raises(CheckpointError) as caught:
        LocalPipeline.from_config(CONF, f"model.path={folder}")
    assert str((folder / name).parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_takes_no_sigmas_is_refused_when_they_are_given(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(CheckpointError, match=r"^model\.sigmas: the scheduler DDIMScheduler cannot be used"):
        LocalPipeline.from_config(CONF, f"model.path={folder}", "model.sigmas=[1.0,0.5]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from((10**400, "vae")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.proof
@settings(max_examples=600)
@given(st.data())
def test_no_configuration_raises_anything_but_a_line(checkpoint: Callable[[str], Path], data: st.DataObject) -> None:
    source = checkpoint("tiny-i2v")
    path = data.draw(st.sampled_from(sorted(source.rglob("*.json"))))
    before = path.read_bytes()
    content = json.loads(before)
    change = st.dictionaries(st.sampled_from((*content, "auto_map", "weight_map", "metadata")), JSON, max_size=3)
    odd = st.one_of(JSON, change.map(lambda changed: content | changed)).map(lambda value: json.dumps(value).encode())
    path.write_bytes(data.draw(odd | st.binary(max_size=40)))
    try:
        check_here(ModelConfig(path=str(source), task="i2v"), whole=True)
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(before)


@pytest.mark.proof
@settings(max_examples=2000)
@given(st.dictionaries(st.text(max_size=3), st.dictionaries(st.sampled_from(("dtype", "shape", "data_offsets")), JSON)),
       st.binary(max_size=16), st.none() | st.integers(0, 2**64 - 1))  # fmt: skip
def test_no_header_raises_anything_but_a_line(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes, length: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    with_header(path, json.dumps(header).encode(), length, data)
    try:
        tensors = read_header(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert set(tensors) == set(load_file(path)), "the library reads another"

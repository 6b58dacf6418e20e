"""Model folders are found, checked and measured before a weight is loaded."""

import io
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from disagg_ray import CheckpointError, ConfigError, load_config
from disagg_ray.config.model import ModelConfig
from disagg_ray.graph import build_graph
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.preflight import check_model
from disagg_ray.models.wan.geometry import WanGeometry
from disagg_ray.models.wan.shapes import SHAPES
from disagg_ray.replica.stage import Stage

CONF = Path(__file__).parent.parent / "conf"
TASKS = {
    "tiny-t2v": "t2v", "tiny-i2v": "i2v", "tiny-flf2v": "flf2v", "tiny-a14b-t2v": "t2v", "tiny-a14b-i2v": "i2v",
    "tiny-ti2v": "ti2v", "tiny-vace": "vace",
}  # fmt: skip
ALIKE = {
    "wan21_t2v_1_3b.yaml": "tiny-t2v",
    "wan21_t2v_14b.yaml": "tiny-t2v",
    "wan21_i2v_14b_480p.yaml": "tiny-i2v",
    "wan21_i2v_14b_720p.yaml": "tiny-i2v",
    "wan21_flf2v_14b_720p.yaml": "tiny-flf2v",
    "wan22_t2v_a14b.yaml": "tiny-a14b-t2v",
    "wan22_i2v_a14b.yaml": "tiny-a14b-i2v",
    "wan22_ti2v_5b.yaml": "tiny-ti2v",
    "wan21_vace_1_3b.yaml": "tiny-vace",
    "wan21_vace_14b.yaml": "tiny-vace",
}
"""Files of published models, and the tiny shape with the same components."""

Made = Callable[[str], Path]


@pytest.fixture
def broken(checkpoint: Made, tmp_path: Path) -> Path:
    """Give a copy of a text-to-video checkpoint to break."""
    return Path(shutil.copytree(checkpoint("tiny-t2v"), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refusal(model: ModelConfig, fetch: Sequence[str] = ()) -> str:
    """Return the message with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model).fetch(fetch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape", TASKS)
def test_a_whole_checkpoint_opens(shape: str, checkpoint: Made) -> None:
    opened = open_checkpoint(ModelConfig(path=str(checkpoint(shape)), task=TASKS[shape]))
    opened.fetch(opened.components)
    assert opened.geometry.two_transformers == ("transformer_2" in opened.components) == ("a14b" in shape)
    assert opened.geometry.boundary_ratio == SHAPES[shape].boundary_ratio


def test_the_geometry_is_that_of_the_components(checkpoint: Made) -> None:
    model = ModelConfig(path=str(checkpoint("tiny-i2v")), task="i2v", max_sequence_length=99)
    assert open_checkpoint(model).geometry == WanGeometry(32, 99, 16, 8, 4, 17, 32)


def test_the_sizes_of_tensors_are_those_of_the_published_model() -> None:
    geometry = WanGeometry(4096, 512, 16, 8, 4, 257, 1280)
    sizes = geometry.tensor_bytes(480 * 832, 81, 480 * 832)
    assert sizes["prompt_embeds"] == 4 * 512 * 4096
    assert sizes["latents"] == 4 * 16 * 21 * 60 * 104
    assert sizes["image_condition_latents"] == 4 * 20 * 21 * 60 * 104
    assert sizes["image_embeds"] == 2 * 4 * 257 * 1280
    assert sizes["image"] == 3 * 480 * 832


def test_a_given_boundary_overrides_the_checkpoint_s(checkpoint: Made) -> None:
    model = ModelConfig(path=str(checkpoint("tiny-a14b-t2v")))
    assert open_checkpoint(model).geometry.boundary_ratio == 0.875
    assert open_checkpoint(replace(model, boundary_ratio=0.5)).geometry.boundary_ratio == 0.5


@pytest.mark.parametrize("ratio", ["half", -1, 1e400, [0.5], None])
def test_a_boundary_that_is_none_is_refused_by_name(checkpoint: Made, tmp_path: Path, ratio: Any) -> None:
    folder = Path(shutil.copytree(checkpoint("tiny-a14b-t2v"), tmp_path / "model"))
    edit(folder / "model_index.json", boundary_ratio=ratio)
    config = load_config(CONF / "tiny_a14b_t2v.yaml", f"model.path={folder}")
    with pytest.raises(ConfigError, match=r"^model\.boundary_ratio"):
        check_model(config, whole=True)


@pytest.mark.parametrize("name", ALIKE)
def test_a_published_model_s_file_cuts_a_model_of_its_kind(name: str, checkpoint: Made) -> None:
    config = load_config(CONF / name, f"model.path={checkpoint(ALIKE[name])}")
    graph = build_graph([Stage(stage, config).ports for stage in config.stages])
    assert graph.order == ("encoder", "transformer", "decoder")


@pytest.mark.parametrize("path", ["{tmp}/nowhere", "{tmp}/file", "", "nowhere", "~nobody-of-that-name/model"])
def test_a_missing_folder_is_refused_by_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    path = path.format(tmp=tmp_path)
    assert refusal(ModelConfig(path=path)).startswith(f"model.path: {path!r}" if path else "model.path: ")


def test_what_looks_like_a_hub_id_needs_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    message = refusal(ModelConfig(path="models/wan"))
    assert message.startswith("model.revision: null")
    assert "'models/wan' is no folder" in message


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find the snapshot.\nCheck your connection."),
        ConnectionError("offline"),
        HFValidationError("Repo id must be in the form 'org/name'"),
        OSError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_hub_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal(ModelConfig(path="org/name", revision="main"))
    assert message.startswith("model.path: 'org/name' could not be fetched from the hub: ")
    assert (str(error).splitlines() or ["OSError"])[0] in message


def test_an_offline_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "could not be fetched" in refusal(ModelConfig(path="org/name", revision="main"))


def test_what_the_hub_s_library_logs_comes_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said, hub = io.StringIO(), logging.getLogger("huggingface_hub")
    handler = logging.StreamHandler(said)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    monkeypatch.setattr(hub, "handlers", [handler])
    test_an_offline_hub_fails_at_once(monkeypatch, tmp_path)
    hub.warning("Retrying in 1s")
    assert said.getvalue() == "Retrying in 1s\n"


def test_the_hub_gives_configurations_first_and_then_safe_weights_of_the_components(
    checkpoint: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, list[str]]] = []

    def download(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(checkpoint("tiny-t2v"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_checkpoint(ModelConfig(path="org/name", revision="0123abc")).fetch(["vae"])
    assert asked[0] == ("org/name", "0123abc", ["*.json"])
    assert asked[1][2] == ["vae/*.json", "vae/*.model", "vae/*.txt", "vae/diffusion_pytorch_model.safetensors"]


def test_a_folder_without_an_index_is_refused(broken: Path) -> None:
    (broken / "model_index.json").unlink()
    message = refusal(ModelConfig(path=str(broken)))
    assert "model_index.json' is missing" in message
    assert "diffusers-format" in message


@pytest.mark.parametrize("name", ["text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_component_is_refused_by_name(name: str, broken: Path) -> None:
    shutil.rmtree(broken / name)
    message = refusal(ModelConfig(path=str(broken)), ["text_encoder", "vae", "tokenizer", "scheduler"])
    assert str(broken / name) in message
    assert "is missing" in message


def test_a_component_that_the_index_lacks_is_refused_by_name(broken: Path) -> None:
    assert "does not list the component 'image_encoder'" in refusal(ModelConfig(path=str(broken)), ["image_encoder"])


def test_weights_other_than_safetensors_are_refused(broken: Path) -> None:
    for path in (broken / "text_encoder").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    message = refusal(ModelConfig(path=str(broken)), ["text_encoder"])
    assert str(broken / "text_encoder") in message
    assert "model.safetensors' is missing; only .safetensors weights are loaded" in message


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two transformers"),
        ("transformer/config.json", {"image_dim": 32}, "wants an image encoder"),
        ("transformer/config.json", {"in_channels": 36}, "other channels than the VAE's latents"),
        ("vae/config.json", {"scale_factor_spatial": 8}, "sizes in multiples of 16, not 32"),
    ],
)
def test_a_ti2v_model_of_another_kind_is_refused_by_name(
    checkpoint: Made, tmp_path: Path, file: str, changes: dict[str, Any], what: str
) -> None:
    folder = Path(shutil.copytree(checkpoint("tiny-ti2v"), tmp_path / "model"))
    edit(folder / file, **changes)
    message = refusal(ModelConfig(path=str(folder), task="ti2v"))
    assert "expand_timesteps" in message and what in message


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", None])
def test_another_kind_of_model_is_refused_by_name(name: str | None, broken: Path) -> None:
    edit(broken / "model_index.json", _class_name=name)
    message = refusal(ModelConfig(path=str(broken)))
    assert f"holds a {name}" in message
    assert "WanImageToVideoPipeline" in message


@pytest.mark.parametrize(
    ("shape", "task", "right"),
    [
        ("tiny-t2v", "i2v", "t2v"),
        ("tiny-t2v", "flf2v", "t2v"),
        ("tiny-i2v", "t2v", "i2v or flf2v"),
        ("tiny-i2v", "flf2v", "write i2v"),
        ("tiny-flf2v", "i2v", "write flf2v"),
        ("tiny-a14b-i2v", "t2v", "i2v or flf2v"),
        ("tiny-ti2v", "i2v", "which serves ti2v"),
        ("tiny-t2v", "ti2v", "which serves t2v"),
    ],
)
def test_a_task_that_the_model_does_not_serve_is_refused(shape: str, task: str, right: str, checkpoint: Made) -> None:
    message = refusal(ModelConfig(path=str(checkpoint(shape)), task=task))
    assert message.startswith(f"model.task: {task!r} does not fit")
    assert right in message


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"[1, 2]", b"\xff\xfe"], ids=["open", "empty", "list", "not text"])
def test_broken_json_is_refused_by_its_file(name: str, content: bytes, broken: Path) -> None:
    (broken / name).write_bytes(content)
    assert str(broken / name) in refusal(ModelConfig(path=str(broken)))


@pytest.mark.parametrize(("name", "key"), [("transformer", "text_dim"), ("vae", "z_dim")])
def test_a_configuration_without_a_number_it_needs_is_refused(name: str, key: str, broken: Path) -> None:
    edit(broken / name / "config.json", **{key: None})
    assert f"lacks {key!r}" in refusal(ModelConfig(path=str(broken)))


def test_a_random_checkpoint_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = open_checkpoint(ModelConfig(path="random:tiny-t2v")).folder
    made = (first / "model_index.json").stat().st_mtime_ns
    assert first.is_relative_to(tmp_path)
    assert open_checkpoint(ModelConfig(path="random:tiny-t2v")).folder == first
    assert (first / "model_index.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("shape", ["tiny-t2w", "", "../tiny-t2v"])
def test_an_unknown_random_shape_is_refused_with_the_nearest(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    message = refusal(ModelConfig(path=f"random:{shape}"))
    assert f"'random:{shape}' cannot be made" in message
    assert "did you mean" in message
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be made" in refusal(ModelConfig(path="random:tiny-t2v"))

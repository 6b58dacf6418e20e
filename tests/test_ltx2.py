"""LTX-2: frames and sound equal stock's bit for bit, split and fused; the sound reaches files; the rest is refused."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import copy_changed, heard, wait_until_empty
from PIL import Image
from splits import ONE, THREE, Load, Split

from disagg_ray import (
    CheckpointError,
    ConfigError,
    LocalPipeline,
    OutputError,
    Pipeline,
    Request,
    RequestError,
    cli,
    load_config,
)
from disagg_ray.batch.manifest import read_manifest, state_of
from disagg_ray.batch.resume import Options
from disagg_ray.batch.run import generate
from disagg_ray.config.schema import Config
from disagg_ray.graph import LATENTS
from disagg_ray.http.bodies import check_body
from disagg_ray.http.schema import ApiError, CreateVideo
from disagg_ray.media.sound import read_wav
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.ltx2.random import build_meta
from disagg_ray.models.ltx2.shapes import SHAPES
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=6144", "limits.max_frames=17")
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 64, "width": 96, "num_frames": 9,
    "num_inference_steps": 3, "guidance_scale": 3.0, "audio_guidance_scale": 7.0, "fps": 24, "seed": 7,
}  # fmt: skip
UNGUIDED = {"guidance_scale": 1.0, "audio_guidance_scale": None, "prompt": "two", "num_frames": 17, "fps": 12}
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": UNGUIDED | {"height": 96, "width": 64},
    "sound alone is guided": {"guidance_scale": 1.0, "audio_guidance_scale": 4.0, "prompt": "  three  "},
    "from a first frame": {"image": (190, 130)},
    "from a first frame, unguided": UNGUIDED | {"image": (96, 64)},
    "isolated and rescaled": {
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
        "audio_modality_scale": 2.0,
        "audio_guidance_rescale": 0.4,
    },
    "from a first frame, isolated and rescaled": {"image": (190, 130), "modality_scale": 3.0, "guidance_rescale": 0.7},
    "perturbed": {"stg_scale": 1.5, "stg_block": 1},
    "perturbed, isolated and rescaled": {
        "stg_scale": 0.0,
        "audio_stg_scale": 2.0,
        "stg_block": 0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
    },
    "from a first frame, perturbed": UNGUIDED | {"image": (96, 64), "stg_scale": 1.0, "stg_block": 0},
    "unguided, isolated": UNGUIDED | {"audio_modality_scale": 2.0, "audio_guidance_rescale": 0.5},
}
"""What differs from `PLAIN`; images are (width, height)."""
OFF = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
OWN = (
    "modality_scale", "guidance_rescale", "audio_modality_scale", "audio_guidance_rescale", "stg_scale",
    "audio_stg_scale",
)  # fmt: skip
"""Fields that only this model has."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-ltx2')}"
    return lambda *overrides: load_config(CONF / "tiny_ltx2.yaml", model, *SMALL, *overrides)


@pytest.fixture(scope="module")
def ask(image: Callable[..., Image.Image]) -> Callable[..., Request]:
    """Give a case's request."""

    def make(case: str = "guided", **asked: Any) -> Request:
        fields = PLAIN | CASES[case] | {"format": "npy"} | asked
        return Request(**fields | ({"image": image(*fields["image"])} if "image" in fields else {}))

    return make


class Stock:
    """The two stock pipelines, which share the components of one checkpoint."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.text = diffusers.LTX2Pipeline.from_pretrained(folder, dtype=dtype)
        self.image = diffusers.LTX2ImageToVideoPipeline(**self.text.components)
        for pipeline in (self.text, self.image):
            pipeline.set_progress_bar_config(disable=True)

    def make(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """Return frames and samples."""
        names = [name for name in PLAIN if name not in ("seed", "fps")]
        own = {name: value for name in OWN if (value := getattr(request, name)) is not None}
        others = dict.fromkeys(("audio_modality_scale", "audio_guidance_rescale")) | OFF | own  # None: the video's
        others["spatio_temporal_guidance_blocks"] = [request.stg_block]
        asked = {name: getattr(request, name) for name in names} | others | {"frame_rate": float(request.fps)}
        pipeline = self.text if request.image is None else self.image
        asked |= {} if request.image is None else {"image": request.image, "image_crf": 0}
        generator = torch.Generator("cpu").manual_seed(request.seed)
        frames, sound = pipeline(
            **asked, generator=generator, max_sequence_length=64, output_type="np", return_dict=False
        )
        return frames[0], sound[0].float().numpy()


@pytest.fixture(scope="module")
def expect(checkpoint: Callable[[str], Path], ask: Callable[..., Request]) -> Callable[[str], Any]:
    """Give the stock pipeline's frames and samples of a case."""
    stock = Stock(checkpoint("tiny-ltx2"))
    return cache(lambda case: stock.make(ask(case)))


@pytest.mark.parametrize("case", CASES)
def test_one_process_equals_stock(configure: Any, expect: Any, ask: Any, case: str) -> None:
    with LocalPipeline(configure()) as local:
        made = local.generate(ask(case))
    frames, samples = expect(case)
    assert np.array_equal(made.frames, frames)
    assert np.array_equal(made.sound.samples, samples)
    assert samples.std() > 0.01 and frames.std() > 0.01


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [THREE, ONE])
def test_replicas_equal_stock(splits: Load[Split], expect: Any, ask: Any, cut: str, case: str) -> None:
    split = splits(cut)
    job = split.submit(ask(case))
    for stage in split.graph.order:
        split.run(job, stage)
    assert job.replies[split.graph.last].has_sound
    last = split.replicas[split.graph.last]
    frames = split.collect(job, release=False)
    sound = read_wav(last.encode(job.key, 24, "wav").data)
    split.release(job)
    assert np.array_equal(frames, expect(case)[0])
    assert np.array_equal(sound.samples, expect(case)[1])
    assert split.bytes_in_use() == {}


@pytest.mark.parametrize("case", ["guided", "from a first frame"])
def test_bfloat16_equals_stock(checkpoint: Callable[[str], Path], configure: Any, ask: Any, case: str) -> None:
    dtypes = "model.dtype={text_encoder: bfloat16, transformer: bfloat16, vae: bfloat16}"
    with LocalPipeline(configure(dtypes)) as local:
        made = local.generate(ask(case))
    frames, samples = Stock(checkpoint("tiny-ltx2"), torch.bfloat16).make(ask(case))
    assert np.array_equal(made.frames, frames)
    assert np.array_equal(made.sound.samples, samples)


@pytest.mark.parametrize(("text_encoder", "transformer"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_transformer_of_another_precision_than_the_texts_runs_which_stock_s_cannot(
    configure: Any, expect: Any, ask: Any, text_encoder: str, transformer: str
) -> None:
    dtypes = f"model.dtype={{text_encoder: {text_encoder}, transformer: {transformer}, vae: float32}}"
    with LocalPipeline(configure(dtypes)) as local:
        made = local.generate(ask()).frames
    assert np.abs(made - expect("guided")[0]).mean() < 0.1


def test_every_stage_warms_up_and_a_text_is_encoded_once(configure: Any, expect: Any, ask: Any) -> None:
    warm = [f"stages.{stage}.warm_up=[[64,96,9]]" for stage in ("encoder", "transformer", "decoder")]
    kept: dict[Any, torch.Tensor] = {}
    cache = SimpleNamespace(get=kept.get, put=lambda key, tensor: kept.setdefault(key, tensor.clone()))
    with LocalPipeline(configure(*warm)) as local:
        local.stages[0].use_cache(cache)
        made = [local.generate(ask("guided", seed=seed)) for seed in (1, 7)]
    assert len(kept) == 3
    assert np.array_equal(made[1].frames, expect("guided")[0])


def test_latents_go_with_those_of_sound_and_so_into_no_file(splits: Load[Split]) -> None:
    graph = splits(THREE).graph
    assert graph.kept is not None
    assert graph.outputs(graph.kept) != (LATENTS,), "then fps, which decides them too, belongs to a request's digest"


@pytest.mark.slow
def test_a_pipeline_on_ray_writes_video_with_sound(
    cluster: None, configure: Any, expect: Any, ask: Any, tmp_path: Path
) -> None:
    frames, samples = expect("guided")
    with Pipeline(configure()) as pipeline:
        batch(pipeline, tmp_path)
        raw = pipeline.generate(ask())
        assert raw.save(tmp_path / "a.npy") == tmp_path / "a.npy"
        file = pipeline.generate(ask(format="mp4")).save(tmp_path / "a.mp4")
        silent = pipeline.generate(ask(format="gif"))
        wait_until_empty(pipeline, 30)
    assert np.array_equal(np.load(tmp_path / "a.npy"), frames)
    assert np.array_equal(read_wav((tmp_path / "a.wav").read_bytes()).samples, samples)
    found = heard(file.read_bytes(), tmp_path)
    assert found.seconds == pytest.approx(samples.shape[1] / 24000, abs=0.1)
    assert found.samples.std() == pytest.approx(samples.std(), rel=0.2)
    assert silent.sound is None


def test_a_job_over_http_may_ask_for_the_scale_of_sound(configure: Any) -> None:
    asked = check_body(CreateVideo(prompt="a", seconds=0.4, audio_guidance_scale=7), {}, configure(), 0)
    assert (asked.settings["audio_guidance_scale"], asked.settings["num_frames"]) == (7, 9)
    with pytest.raises(ApiError, match=r"audio_guidance_scale=7.0: must be left out"):
        check_body(CreateVideo(prompt="a", audio_guidance_scale=7), {}, load_config(CONF / "tiny_t2v.yaml"), 0)


def test_raw_frames_are_not_written_where_their_sound_cannot_be(configure: Any, ask: Any, tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    argv = ["--config", "conf/tiny_ltx2.yaml", "--prompt", "a", "--output", str(tmp_path / "a.npy")]
    assert cli.main(["generate", *argv, "--local"]) == 2
    with pytest.raises(OutputError, match=r"a\.wav' exists"):
        LocalPipeline(configure()).generate(ask(format="npy")).save(tmp_path / "a.npy", overwrite=False)
    assert not (tmp_path / "a.npy").exists()


def test_the_command_names_raw_frames_and_their_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "conf/tiny_ltx2.yaml", "--prompt", "a", "--output", str(tmp_path / "a.npy"), "--local"]
    assert cli.main(["generate", *argv, *SMALL, "--num-frames=9", "--num-inference-steps=2"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'a.npy'}\nwrote {tmp_path / 'a.wav'}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "a.wav"}


def batch(pipeline: Pipeline, folder: Path) -> None:
    """Make raw frames in a batch, damage their sound, and have them made again."""
    line = {name: value for name, value in PLAIN.items() if name != "id"} | {"id": "a", "format": "npy"}
    (folder / "requests.jsonl").write_text(json.dumps(line))
    options, sound = Options(folder / "requests.jsonl", folder / "out", verify=True), folder / "out" / "a.wav"
    for _ in range(2):
        assert generate(options, pipeline.config, lambda _: nullcontext(pipeline)).done == 1
        *_, record = read_manifest(folder / "out")
        assert (record.file, record.sound_file, record.sound) == ("a.npy", "a.wav", state_of(sound))
        sound.write_bytes(sound.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("format", ["gif", "frames"])
def test_a_format_without_sound_says_so(
    configure: Any, ask: Any, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    with caplog.at_level("INFO", "disagg_ray"):
        resolve(ask(format=format, id="a"), configure())
    assert f"request a: {format} holds no sound, so it is left out; ask for mp4, or for npy" in caplog.text


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"num_frames": 5}, "invalid num_frames=5: must be 8k + 1"),
        ({"height": 48}, "invalid height=48: must be a positive multiple of 32"),
        ({"width": 32}, "invalid width=32: must be at least 64"),
        ({"num_inference_steps": 1}, "invalid num_inference_steps=1: must be at least 2"),
        ({"num_frames": 1, "fps": 60}, "invalid fps=60: must be at most 49: 1 frames would be over before"),
        ({"stg_scale": -1.0}, "invalid stg_scale=-1.0: must be a finite number of at least 0"),
        ({"stg_scale": 1.0, "stg_block": 48}, "invalid stg_block=48: must be from 0 to 47"),
        ({"guidance_scale_2": 2.0}, "invalid guidance_scale_2=2.0: must be left out"),
        ({"last_image": Image.new("RGB", (8, 8))}, "last_image: given, but a model of task ti2v takes none"),
        ({"format": "wav"}, "invalid format='wav': must be one of mp4, gif, frames, npy"),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(configure: Any, ask: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(ask(**asked), configure())
    assert str(caught.value).startswith(says)


def test_a_block_that_the_model_has_not_is_refused_by_name(configure: Any, ask: Any) -> None:
    with (
        LocalPipeline(configure()) as local,
        pytest.raises(RequestError, match=r"^invalid stg_block=29: must be"),
    ):
        local.generate(ask(stg_scale=1.0))


@pytest.mark.parametrize("name", ["tiny_t2v", "tiny_qwen_image"])
def test_a_scale_of_sound_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(RequestError, match=r"^invalid audio_guidance_scale=7.0: must be left out: .* those of ltx2 do"):
        resolve(Request("a", audio_guidance_scale=7.0), load_config(CONF / f"{name}.yaml"))
    with pytest.raises(ConfigError, match=r"^invalid defaults.audio_guidance_scale=7.0: must be left out"):
        load_config(CONF / f"{name}.yaml", "defaults.audio_guidance_scale=7.0")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.flow_shift=3", "invalid model.flow_shift"),
        ("model.task=t2v", "invalid model.task='t2v': must be one of ti2v"),
        ("stages.transformer.parallel.ulysses=2", "invalid stages.transformer.parallel.ulysses=2: must be left out"),
        ("stages.decoder.parallel.rows=2", "invalid stages.decoder.parallel.rows=2: must be left out"),
        ("stages.transformer.denoiser.attention=auto", "invalid stages.transformer.denoiser.attention"),
        ("stages.transformer.denoiser.compile=default", "invalid stages.transformer.denoiser.compile"),
        ("stages.transformer.denoiser.fuse=true", "invalid stages.transformer.denoiser.fuse"),
        ("stages.transformer.denoiser.loras=[{path: a.safetensors}]", "invalid stages.transformer.denoiser.loras"),
        ("stages.transformer.denoiser.quantization=fp8_storage", "invalid stages.transformer.denoiser.quantization"),
        (
            "stages.transformer.denoiser.step_cache.method=first_block",
            "invalid stages.transformer.denoiser.step_cache.method='first_block'",
        ),
        ("stages.decoder.vae.compile=true", "invalid stages.decoder.vae.compile"),
        ("stages.decoder.vae.channels_last=true", "invalid stages.decoder.vae.channels_last"),
        ("stages.decoder.vae.tile_pixels=0", "invalid stages.decoder.vae.tile_pixels"),
    ],
)
def test_what_does_not_work_yet_is_refused_by_key(configure: Any, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(override)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("connectors/config.json", {"per_modality_projections": True}, "per_modality_projections, of LTX-2.3"),
        ("transformer/config.json", {"cross_attn_mod": True}, "cross_attn_mod, of LTX-2.3"),
        ("transformer/config.json", {"audio_hop_length": 80}, "transformer.audio_hop_length of"),
        ("audio_vae/config.json", {"sample_rate": 8000}, "transformer.audio_sampling_rate of"),
        ("vae/config.json", {"temporal_compression_ratio": 4}, "transformer.vae_scale_factors of"),
        ("vae/config.json", {"timestep_conditioning": True}, "timestep_conditioning"),
        ("model_index.json", {"vocoder": ["ltx2", "LTX2VocoderWithBWE"]}, "must be one of LTX2Vocoder of ltx2"),
        ("model_index.json", {"_class_name": "LTX2ConditionPipeline"}, "LTX2Pipeline, LTX2ImageToVideoPipeline"),
    ],
)
def test_other_models_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = copy_changed(checkpoint("tiny-ltx2"), tmp_path, file, changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(load_config(CONF / "tiny_ltx2.yaml", f"model.path={folder}", *SMALL).model)
    assert says in str(caught.value)


def test_a_text_is_as_long_as_learnt_tokens_pad_it(configure: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model.max_sequence_length: 60 is no multiple of the 8 learnt tokens"):
        open_checkpoint(configure("model.max_sequence_length=60").model)


def test_the_published_shape_has_the_published_sizes() -> None:
    modules = build_meta(SHAPES["ltx-2"])
    billions = {name: sum(p.numel() for p in module.parameters()) / 1e9 for name, module in modules.items()}
    assert billions["text_encoder"] == pytest.approx(12.2, rel=0.01)  # Gemma 3 12B
    assert billions["transformer"] == pytest.approx(18.9, rel=0.01)  # which with the rest is the 19B of its name


def test_a_size_left_out_follows_the_image_and_is_no_thinner_than_the_least(configure: Any) -> None:
    config = configure()
    for size, found in (((100, 100), (64, 64)), ((900, 30), (64, 64)), ((30, 900), (64, 64))):
        resolved, _ = resolve(Request("a", image=Image.new("RGB", size)), config)
        assert (resolved.height, resolved.width) == found, size
    wide, _ = resolve(Request("a", image=Image.new("RGB", (900, 30)), width=96), config)
    assert (wide.height, wide.width) == (64, 96)


@pytest.mark.parametrize("field", OWN)
def test_fields_that_only_ltx_2_has_are_refused_by_name_elsewhere(configure: Any, field: str) -> None:
    with pytest.raises(RequestError, match=rf"^{field}: given, but a model of task t2v takes none.*ti2v of ltx2"):
        resolve(Request("a", **{field: 1.0}), load_config(CONF / "tiny_t2v.yaml"))
    assert getattr(resolve(Request("a", **{field: 1.0}), configure())[0], field) == 1.0
    asked = check_body(CreateVideo(prompt="a", **{field: 0.5}), {}, configure(), 0)
    assert asked.settings[field] == 0.5
    with pytest.raises(RequestError, match=rf"^invalid {field}=-1: "):
        resolve(Request("a", **{field: -1}), configure())

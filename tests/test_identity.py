"""Latents made before are used again only for what they were made of: picture, LoRA, options, versions."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import connect_stages
from PIL import Image
from safetensors.torch import save_file

from disagg_ray import Connection, LocalPipeline, Pipeline, Request, RequestError, cli, load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import ConfigError
from disagg_ray.graph import build_graph
from disagg_ray.models import identity
from disagg_ray.models.identity import identify_blocks, identify_request, identify_setup
from disagg_ray.models.provenance import digest_model
from disagg_ray.models.random import make_checkpoint
from disagg_ray.replica.sizing import driver_pool_bytes
from disagg_ray.request import resolve
from disagg_ray.result import Result
from disagg_ray.service.protocol import UnknownRequest
from disagg_ray.service.stub import SupervisorStub

I2V = "conf/tiny_i2v.yaml"
CONFIG = load_config(I2V)
TWO = ["stages.encoder=null", "stages.transformer.blocks=[text_encoder,image_encoder,vae_encoder,denoise]"]
"""As fused as can be while latents travel."""
RED, BLUE = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
ASKED = Request(
    "a circle", image=RED, seed=5, height=64, width=64, num_frames=5, num_inference_steps=2, format="npy", id="one"
)
LONG = replace(ASKED, height=128, width=128, num_inference_steps=100)


def stages(result: Result) -> list[str]:
    return [timing.stage for timing in result.stages]


def make_lora(path: Path, seed: int) -> Path:
    generator, prefix = torch.Generator().manual_seed(seed), "transformer.blocks.0.attn1.to_q"
    shapes = {"A": (4, 192), "B": (192, 4)}
    save_file({f"{prefix}.lora_{n}.weight": torch.randn(*s, generator=generator) for n, s in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def local() -> LocalPipeline:
    return LocalPipeline.from_config(I2V, *TWO)


@pytest.mark.slow
def test_more_resumed_requests_than_the_drivers_pool_holds_wait_for_their_turn(cluster: None, tmp_path: Path) -> None:
    most = replace(ASKED, height=256, width=256, num_frames=33, num_inference_steps=1, image=RED.resize((256, 256)))
    settings = [*TWO, "limits.max_image_pixels=65536"]
    stages_of = connect_stages(load_config(I2V, *settings))
    graph, geometry = build_graph([s.ports for s in stages_of.values()]), stages_of["decoder"].geometry
    with pytest.raises(ConfigError, match="one request may take") as refused:
        driver_pool_bytes(load_config(I2V, *settings, "transport.driver_pool_bytes=1"), graph, geometry)
    least = str(refused.value).split()[-2]
    with Pipeline.from_config(I2V, *settings, f"transport.driver_pool_bytes={least}") as pipeline:
        pipeline.submit(most, latents_file=tmp_path / "latents").result(180)
        again = [pipeline.submit(replace(most, id=f"{n}"), latents_file=tmp_path / "latents") for n in range(4)]
        assert [stages(handle.result(180)) for handle in again] == [["decoder"]] * 4


@pytest.mark.slow
@pytest.mark.quick
def test_a_resume_under_another_picture_or_lora_computes_anew(
    cluster: None, tmp_path: Path, local: LocalPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    kept, lora = tmp_path / "latents", make_lora(tmp_path / "style.safetensors", 1)
    with_lora = f"stages.transformer.denoiser.loras=[{{path: {lora}}}]"
    with Pipeline.from_config(I2V, *TWO) as pipeline:
        assert stages(pipeline.submit(ASKED, latents_file=kept).result()) == ["transformer", "decoder"]
        assert stages(pipeline.submit(ASKED, latents_file=kept).result()) == ["decoder"]
        blue = pipeline.submit(replace(ASKED, image=BLUE), latents_file=kept).result()
        assert stages(blue) == ["transformer", "decoder"]
        assert np.array_equal(blue.frames, local.generate(replace(ASKED, image=BLUE)).frames)
        assert "computing them again: made for another prompt, image or other field" in caplog.text
        first = pipeline.submit(replace(LONG, num_frames=17))
        with pytest.raises(RequestError, match="id: 'one' is in flight already"):
            pipeline.submit(ASKED)
        first.cancel()
        assert np.array_equal(pipeline.generate(ASKED).frames, local.generate(ASKED).frames), "it is free again"
    with Pipeline.from_config(I2V, *TWO, with_lora) as pipeline:
        again = pipeline.submit(replace(ASKED, image=BLUE), latents_file=kept).result()
    assert stages(again) == ["transformer", "decoder"]
    assert not np.array_equal(again.frames, blue.frames)
    assert "made by another model, LoRA, precision, option or version of denoise" in caplog.text


@pytest.mark.slow
def test_a_service_computes_anew_what_is_asked_with_another_picture_under_the_same_ids(
    cluster: None, local: LocalPipeline
) -> None:
    assert cli.main(["up", "pictures", "--config", I2V, "fused=true"]) == 0
    try:
        with Connection("pictures", run_id="run") as first, Connection("pictures", run_id="run") as second:
            long = first.submit(LONG)
            with pytest.raises(RequestError, match="id: 'one' is in flight already"):
                first.submit(ASKED)
            with pytest.raises(RequestError, match="id: 'one' is in flight under this run id"):
                second.submit(ASKED)
            same = second.submit(LONG)
            assert np.array_equal(same.result().frames, long.result().frames), "the same again is a reconnect"
            red, blue = first.generate(ASKED), second.generate(replace(ASKED, image=BLUE))
            assert np.array_equal(red.frames, local.generate(ASKED).frames)
            assert np.array_equal(blue.frames, local.generate(replace(ASKED, image=BLUE)).frames)
            long = first.submit(LONG)
            with pytest.raises(UnknownRequest):
                first.loop.call(SupervisorStub("pictures").ask, "result", "run", "one", "a ticket of before")
            long.cancel()
    finally:
        assert cli.main(["down", "pictures"]) == 0


CHANGES: list[dict[str, Any]] = [
    {"image": BLUE}, {"prompt": "a square"}, {"negative_prompt": "red"}, {"seed": 6}, {"num_frames": 9},
    {"num_inference_steps": 3}, {"guidance_scale": 1.5}, {"height": 80},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_field_that_changes_latents_changes_a_request_s_digest(change: dict[str, Any]) -> None:
    before, after = (identify_request(resolve(request, CONFIG)[0]) for request in (ASKED, replace(ASKED, **change)))
    assert before != after


def test_a_picture_is_known_by_its_pixels_whatever_its_file(tmp_path: Path) -> None:
    paths = [tmp_path / "red.png", tmp_path / "red.bmp"]
    for path in paths:
        RED.save(path)
    files = [replace(ASKED, image=path, id=path.name, priority=1, fps=8, format="mp4") for path in paths]
    assert len({identify_request(resolve(request, CONFIG)[0]) for request in (ASKED, *files)}) == 1


def blocks(config: Config, folder: Path | None = None) -> dict[str, str]:
    return {
        block: digest for stage in config.stages for block, digest in identify_blocks(config, stage, folder).items()
    }


OPTIONS = {
    "model.flow_shift=7": {"text_encoder", "image_encoder", "vae_encoder", "denoise", "decode"},
    "model.dtype.text_encoder=float16": {"text_encoder"},
    "model.dtype.vae=bfloat16": {"vae_encoder", "decode"},
    "stages.transformer.dtype=bfloat16": {"denoise"},
    "stages.transformer.num_threads=3": {"denoise"},
    "stages.transformer.denoiser.step_cache.method=first_block": {"denoise"},
    "stages.transformer.denoiser.quantization=fp8_storage": {"denoise"},
    "stages.transformer.denoiser.attention=native": {"denoise"},
    "stages.encoder.vae.tile_pixels=1024": {"vae_encoder"},
    "stages.decoder.vae.channels_last=true": {"decode"},
    "stages.transformer.replicas=3": set(),
    "stages.transformer.num_cpus=0.5": set(),
    "limits.max_steps=60": set(),
    "transport.verify=false": set(),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_digest_of_just_the_blocks_whose_numbers_it_changes(option: str) -> None:
    before, after = blocks(CONFIG), blocks(load_config(I2V, option))
    assert {block for block in before if before[block] != after[block]} == OPTIONS[option]
    assert (identify_setup(CONFIG) == identify_setup(load_config(I2V, option))) == (not OPTIONS[option])


def test_a_block_has_one_digest_in_every_cut() -> None:
    assert blocks(CONFIG) == blocks(load_config(I2V, *TWO)) == blocks(load_config(I2V, "fused=true"))


def test_a_component_s_precision_counts_where_it_is_not_that_of_the_block_s_main_one() -> None:
    own = "stages.decoder.vae.dtype=float32"
    before, after = (
        blocks(load_config("builtin:tiny_ltx2", own, f"model.dtype.vae={dtype}")) for dtype in ("float32", "bfloat16")
    )
    assert {block for block in before if before[block] != after[block]} == {"vae_encoder", "decode"}


def test_defaults_and_output_belong_to_the_setup_but_not_to_the_blocks() -> None:
    other = load_config(I2V, "defaults.fps=8", "output.scale=2")
    assert blocks(other) == blocks(CONFIG)
    assert identify_setup(other) != identify_setup(CONFIG)


def test_weights_that_changed_on_disk_and_other_versions_change_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("tiny-i2v", tmp_path / "model")
    config = load_config(I2V, f"model.path={folder}", "model.max_sequence_length=512")
    digests = [blocks(config, folder)]
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    digests.append(blocks(config, folder))
    monkeypatch.setattr("disagg_ray.models.provenance.SMALL_BYTES", 0)
    digests.append(blocks(config, folder))
    os.utime(weights, ns=(1, 1))
    digests.append(blocks(config, folder))
    monkeypatch.setattr(identity, "_versions", lambda: {"torch": "3"})
    digests.append(blocks(config, folder))
    assert all(len({digest[block] for digest in digests}) == len(digests) for block in digests[0])


@pytest.mark.parametrize("library", ["flash-attn", "sageattention", "xformers"])
def test_another_version_of_an_attention_backend_changes_every_block(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = blocks(CONFIG)
    about = tmp_path / f"{library.replace('-', '_')}-9.9.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(identity, "_versions", identity._versions.__wrapped__)
    after = blocks(CONFIG)
    assert all(before[block] != after[block] for block in before)


def test_a_lora_is_known_by_its_content(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return blocks(load_config(I2V, f"stages.transformer.denoiser.loras=[{{path: {path}}}]"))["denoise"]

    first = digest(make_lora(tmp_path / "a.safetensors", 1))
    assert first == digest(make_lora(tmp_path / "b.safetensors", 1))
    assert first != digest(make_lora(tmp_path / "a.safetensors", 2))


def test_only_a_commit_s_folder_of_the_hub_s_cache_is_known_by_its_name(tmp_path: Path) -> None:
    commit, mine = tmp_path / "snapshots" / ("0a" * 20), tmp_path / "snapshots" / "mine"
    for folder in (commit, mine):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    before = [digest_model(CONFIG.model, folder) for folder in (commit, mine, None)]
    (mine / "model_index.json").write_text("{ }")
    assert before[0] == "commit " + "0a" * 20
    assert len({*before, digest_model(CONFIG.model, mine)}) == 4

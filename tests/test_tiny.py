"""The world of the tiny models: its judge, its training script, its VAE pass."""

import random
from pathlib import Path

import pytest
import torch
from tiny import networks, train
from tiny.world import HELD_OUT, TRAINING, agreement, held_out_prompts, judge, render, scene_table, to_pixels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_judge_reads_the_truth_and_shuffled_captions_score_as_chance() -> None:
    scenes = [scene for _, scene in held_out_prompts(100)]
    clips, _ = render(scene_table(scenes), generator=torch.Generator().manual_seed(0))
    verdicts = [judge(frames) for frames in to_pixels(clips)]
    assert min(agreement(verdicts, scenes).values()) >= 0.99
    shuffled = agreement(verdicts, random.Random(0).sample(scenes, len(scenes)))
    assert shuffled["colour"] < 0.4 and shuffled["direction"] < 0.4 and shuffled["shape"] < 0.5


def test_judge_sees_no_shape_in_an_empty_clip_and_no_direction_in_a_still_one() -> None:
    clips, _ = render(scene_table(TRAINING[:1]), num_frames=1, generator=torch.Generator().manual_seed(0))
    still = to_pixels(clips.expand(-1, -1, 17, -1, -1))[0]
    assert judge(still).direction == "" and judge(still).colour == TRAINING[0].colour
    assert judge(torch.full_like(still, 128)).shape == ""


def test_held_out_scenes_do_not_train_but_every_pair_of_values_does() -> None:
    assert not set(HELD_OUT) & set(TRAINING) and len(HELD_OUT) == 96
    for one in ("colour", "background", "shape", "direction"):
        for other in ("colour", "background", "shape", "direction"):
            pairs = {(getattr(scene, one), getattr(scene, other)) for scene in HELD_OUT}
            assert pairs <= {(getattr(scene, one), getattr(scene, other)) for scene in TRAINING}


def test_whole_pass_of_the_vae_equals_the_chunked_one() -> None:
    torch.manual_seed(0)
    vae = networks.build_vae().eval()
    for parameter in vae.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    clips = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae._encode(clips)
        assert torch.allclose(networks.encode_whole(vae, clips), posterior, atol=1e-4)
        decoded = networks.decode_whole(vae, posterior[:, :16]).clamp(-1, 1)
        assert torch.allclose(decoded, vae.decode(posterior[:, :16]).sample, atol=1e-4)


@pytest.mark.proof
def test_smoke_training_lowers_each_loss_and_can_go_on(tmp_path: Path) -> None:
    losses = train.main(["--out", str(tmp_path), "--smoke"])
    assert all(sum(stage[-3:]) < 0.9 * sum(stage[:3]) for stage in losses.values()), losses
    saved = torch.load(tmp_path / "t2v.pt")["transformer"]["proj_out.weight"]
    again = train.build_modules(tmp_path, with_image=False)["transformer"].proj_out.weight
    assert torch.equal(saved, again) and saved.abs().max() > 0
    assert train.load_vae(tmp_path, "cpu").config.latents_std is not None
    pipeline = networks.load_stock_pipeline(tmp_path / "tiny-wan-i2v")
    assert pipeline.transformer.config.in_channels == 36

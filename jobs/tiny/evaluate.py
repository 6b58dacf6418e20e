"""Score a tiny Wan: do the generated clips show what the prompt asked for?

    python jobs/tiny_model.py evaluate conf/tiny_t2v.yaml
    python jobs/tiny_model.py evaluate conf/tiny_i2v.yaml --sheet i2v.png
    python jobs/tiny_model.py evaluate out/tiny/tiny-wan-t2v --num-prompts 50  # a folder: the stock diffusers pipeline

The prompts name combinations of attributes that no training clip had. The judge is classical image analysis: the first
rows show that it reads ground-truth clips right, and that shuffled captions score as chance does. Size and speed count
where the prompt names them. For I2V the given image is the first frame of a clip of the scene.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tiny import networks
from tiny.world import (
    ATTRIBUTES,
    CHANCE,
    IMAGE_SIZE,
    NUM_FRAMES,
    agreement,
    asked_for,
    contact_sheet,
    held_out_prompts,
    judge,
    render,
    scene_table,
    to_pixels,
)
from torch import Tensor

from disagg_ray import Request
from disagg_ray.local import LocalPipeline
from disagg_ray.media.video import encode_png, quantise, to_image
from disagg_ray.models.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 20
GUIDANCE = 2.0

Generate = Callable[[str, int, "Image | None", float], Tensor]
"""Prompt, seed, first frame (I2V), guidance scale -> frames (17, 64, 64, 3) uint8."""


def own_generator(pipeline: LocalPipeline) -> Generate:
    def generate(prompt: str, seed: int, image: Image | None, guidance: float) -> Tensor:
        request = Request(prompt, image=image, seed=seed, guidance_scale=guidance, format="npy")
        frames = pipeline.generate(request).frames
        assert frames is not None, "npy keeps the frames"
        return torch.from_numpy(quantise(frames))

    return generate


def stock_generator(folder: Path) -> Generate:
    pipeline = networks.load_stock_pipeline(folder, "cuda" if torch.cuda.is_available() else "cpu")

    def generate(prompt: str, seed: int, image: Image | None, guidance: float) -> Tensor:
        frames = pipeline(
            prompt=prompt,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_frames=NUM_FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            max_sequence_length=networks.MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **({} if image is None else {"image": image}),
        ).frames[0]
        return torch.from_numpy(quantise(frames))

    return generate


def psnr(pixels: Tensor, others: Tensor) -> float:
    """Decibels between uint8 pixels."""
    return -10 * math.log10(max(1e-10, float((pixels.float() - others.float()).square().mean()) / 255**2))


def print_row(name: str, values: dict[str, float], rest: str = "") -> None:
    print(f"| {name} | " + " | ".join(f"{100 * values[key]:.1f}" for key in ATTRIBUTES) + f" | {rest} |", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a configuration, or a diffusers folder for the stock pipeline")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, GUIDANCE])
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first clips here")
    options = parser.parse_args(arguments)
    if options.model.is_dir():
        folder, generate = options.model, stock_generator(options.model)
    else:
        pipeline = LocalPipeline.from_config(options.model)
        folder, generate = open_checkpoint(pipeline.config.model).folder, own_generator(pipeline)
    with_image = (folder / "image_encoder").exists()

    prompts = held_out_prompts(options.num_prompts)
    asked = [asked_for(prompt, scene) for prompt, scene in prompts]
    clips, _ = render(scene_table([scene for _, scene in prompts]), generator=torch.Generator().manual_seed(0))
    truth = to_pixels(clips)
    print(f"| % right, {len(prompts)} clips | " + " | ".join(ATTRIBUTES) + " | |")
    print("|---" * (len(ATTRIBUTES) + 2) + "|")
    print_row("chance", CHANCE)
    verdicts = [judge(frames) for frames in truth]
    print_row("judge on ground truth", agreement(verdicts, asked))
    print_row("judge on shuffled captions", agreement(verdicts, random.Random(0).sample(asked, len(asked))))
    again = to_pixels(networks.reconstruct(folder, clips[:50]))
    verdicts = [judge(frames) for frames in again]
    print_row("VAE reconstruction", agreement(verdicts, asked[:50]), f"{psnr(again, truth[:50]):.1f} dB")
    for guidance in options.guidance:
        begin = time.monotonic()
        videos = []
        for seed, (prompt, _) in enumerate(prompts):
            image = to_image(truth[seed, 0].numpy()) if with_image else None
            videos.append(generate(prompt, seed, image, guidance))
        rest = f"{(time.monotonic() - begin) / len(videos):.2f} s a clip"
        if with_image:
            decibels = [psnr(video[0], frames[0]) for video, frames in zip(videos, truth, strict=True)]
            rest += f"; first frame {sum(decibels) / len(decibels):.1f} dB"
        print_row(f"guidance {guidance}", agreement([judge(video) for video in videos], asked), rest)
    if options.sheet:
        options.sheet.write_bytes(encode_png(contact_sheet(torch.stack(videos[:12]))))

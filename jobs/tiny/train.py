"""Train the tiny Wan on clips of one moving shape: the VAE, then text to video, then image to video from it.

    python jobs/tiny_model.py train --out out/tiny --stage vae --seconds 240
    python jobs/tiny_model.py train --out out/tiny --stage t2v --seconds 400
    python jobs/tiny_model.py train --out out/tiny --stage i2v --seconds 400
    python jobs/tiny_model.py train --out out/smoke --smoke              # every stage, a few steps, on a CPU

Each stage ends at its time with a learning rate of zero, and writes a checkpoint (every minute too) and its losses;
vae also a sheet of reconstructions, t2v and i2v a diffusers folder. A stage goes on from its checkpoint where --out has
one. Once the latents are measured the VAE's encoder is fixed, so that more training of the decoder leaves the
transformers valid.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tiny import networks
from tiny.fit import Plan, fit
from tiny.world import (
    CAPTIONS_PER_SCENE,
    NUM_FRAMES,
    SCENES,
    TRAINING,
    caption,
    contact_sheet,
    render,
    scene_table,
    to_pixels,
)
from torch import Tensor

from disagg_ray.media.video import encode_png

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import PreTrainedTokenizerFast

EMPTY_CAPTION_SHARE = 0.1  # of the samples, for classifier-free guidance
UNKNOWN_WORD_SHARE = 0.01
KL_WEIGHT = 3e-5
NEAR_PX = 3.0  # the VAE's loss counts pixels in the shape and this far around it
NEAR_WEIGHT = 8.0  # times as much as the rest


def load_vae(out: Path, device: str) -> AutoencoderKLWan:
    """The VAE as far as it is trained."""
    vae = networks.build_vae()
    if (out / "vae.pt").exists():
        checkpoint = torch.load(out / "vae.pt", weights_only=True)
        vae.load_state_dict(checkpoint["weights"])
        vae.register_to_config(latents_mean=checkpoint["latents_mean"], latents_std=checkpoint["latents_std"])
    if device == "cuda":
        networks.channels_last(vae)
    return vae.to(device)


def train_vae(out: Path, plan: Plan) -> list[float]:
    vae = load_vae(out, plan.device)
    measured = vae.config.latents_mean is not None
    vae.encoder.requires_grad_(not measured)
    vae.quant_conv.requires_grad_(not measured)
    table = scene_table(TRAINING).to(plan.device)

    def loss() -> Tensor:
        rows = table[torch.randint(len(table), (plan.batch,), device=plan.device)]
        clips, distance = render(rows, plan.num_frames)
        centre, log_variance = networks.encode_whole(vae, clips).float().chunk(2, 1)
        latents = centre + torch.exp(0.5 * log_variance) * torch.randn_like(centre)
        error = networks.decode_whole(vae, latents).float() - clips
        weight = 1 + (NEAR_WEIGHT - 1) * (distance < NEAR_PX)
        pixels = (weight * (error.square() + 0.1 * error.abs())).mean() / weight.mean()
        divergence = 0.5 * (centre.square() + log_variance.exp() - 1 - log_variance).mean()
        return pixels + KL_WEIGHT * divergence

    def save() -> None:
        checkpoint = {
            "weights": {name: value.cpu() for name, value in vae.state_dict().items()},
            "latents_mean": vae.config.latents_mean,
            "latents_std": vae.config.latents_std,
        }
        torch.save(checkpoint, out / "vae.pt")

    losses = fit(out / "vae", plan, [vae], loss, save)
    if not measured:
        measure_latents(vae, table, plan)
        save()
    clips, _ = render(table[:: len(table) // 6], plan.num_frames)
    with torch.no_grad():
        again = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    sheet = contact_sheet(to_pixels(torch.stack([clips, again], 1).flatten(0, 1)))
    (out / "vae.png").write_bytes(encode_png(sheet))
    decibels = -10 * math.log10(float(((clips - again) / 2).square().mean()))
    print(f"vae: reconstruction {decibels:.1f} dB", flush=True)
    return losses


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, table: Tensor, plan: Plan) -> None:
    """Write the mean and standard deviation of each latent channel into the VAE's config."""
    rows = table[torch.randperm(len(table), device=table.device)[: plan.num_clips]]
    latents = torch.cat([networks.encode_whole(vae, render(part)[0])[:, :16] for part in torch.split(rows, 32)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )


@torch.no_grad()
def normalised_latents(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """(n, 3, 1 + 4k, h, w) to (n, 16, 1 + k, h / 8, w / 8)."""
    centre = torch.tensor(vae.config.latents_mean, device=clips.device).view(1, -1, 1, 1, 1)
    scale = torch.tensor(vae.config.latents_std, device=clips.device).view(1, -1, 1, 1, 1)
    return (networks.encode_whole(vae, clips)[:, :16] - centre) / scale


def first_frame_condition(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """First frames (n, 3, h, w) to the 20 channels that I2V adds: mask (4), and latents of the frame before zeros."""
    zeros = frames.new_zeros(*frames.shape[:2], NUM_FRAMES - 1, *frames.shape[2:])
    latents = normalised_latents(vae, torch.cat([frames[:, :, None], zeros], 2))
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


@dataclass(frozen=True)
class Clips:
    """What a transformer trains on, on the device; n clips."""

    scene: Tensor
    """(n,) int64, index into TRAINING."""
    latents: Tensor
    """(n, 16, 5, 8, 8) float16, normalised."""
    condition: Tensor
    """(n, 20, 5, 8, 8) float16, or no channels for T2V."""
    first: Tensor
    """(n, 3, 64, 64) float16, first frames as the image encoder wants them, or no channels for T2V."""


def make_clips(vae: AutoencoderKLWan, plan: Plan, *, with_image: bool) -> Clips:
    table = scene_table(TRAINING).to(plan.device)
    scene = torch.randint(len(TRAINING), (plan.num_clips,), device=plan.device)
    processor = networks.build_image_processor()
    centre = torch.tensor(processor.image_mean, device=plan.device)[:, None, None]
    scale = torch.tensor(processor.image_std, device=plan.device)[:, None, None]
    parts = []
    for index in torch.split(scene, 256):
        clips, _ = render(table[index])
        first = clips[:, :, 0]
        latents = normalised_latents(vae, clips).half()
        condition = first_frame_condition(vae, first).half() if with_image else latents[:, :0]
        parts.append((latents, condition, ((first / 2 + 0.5 - centre) / scale if with_image else first[:, :0]).half()))
    return Clips(scene, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def tokenise(plan: Plan) -> tuple[Tensor, Tensor]:
    """Token ids of the empty caption (32,), and of all captions of all training scenes (scenes, captions, 32)."""
    captions = [caption(scene, wording) for scene in TRAINING for wording in range(CAPTIONS_PER_SCENE)]
    ids = tokenizer()(["", *captions], padding="max_length", max_length=networks.MAX_SEQUENCE_LENGTH)["input_ids"]
    table = torch.tensor(ids, device=plan.device)
    return table[0], table[1:].reshape(len(TRAINING), CAPTIONS_PER_SCENE, -1)


def tokenizer() -> PreTrainedTokenizerFast:
    """It knows the words of every scene, held out or not."""
    return networks.build_tokenizer(
        caption(scene, wording) for scene in SCENES for wording in range(CAPTIONS_PER_SCENE)
    )


def build_modules(out: Path, *, with_image: bool) -> dict[str, Any]:
    """Text encoder, transformer and for I2V an image encoder, from this stage's checkpoint or I2V from T2V's."""
    modules = {
        "text_encoder": networks.build_text_encoder(len(tokenizer())),
        "transformer": networks.build_transformer(with_image=with_image),
    }
    if with_image:
        modules["image_encoder"] = networks.build_image_encoder()
    own, text_only = out / ("i2v.pt" if with_image else "t2v.pt"), out / "t2v.pt"
    if own.exists():
        checkpoint = torch.load(own, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
    elif text_only.exists():
        checkpoint = torch.load(text_only, weights_only=True)
        modules["text_encoder"].load_state_dict(checkpoint["text_encoder"])
        narrow = networks.build_transformer(with_image=False)
        narrow.load_state_dict(checkpoint["transformer"])
        modules["transformer"] = networks.widen_for_image(narrow)
    return modules


def train_transformer(out: Path, plan: Plan, *, with_image: bool) -> list[float]:
    """Train by flow matching, the encoders along with the transformer."""
    name, device = ("i2v" if with_image else "t2v"), plan.device
    vae = load_vae(out, plan.device)
    clips = make_clips(vae, plan, with_image=with_image)
    empty, tokens = tokenise(plan)
    modules = {key: module.to(device).train() for key, module in build_modules(out, with_image=with_image).items()}
    text_encoder, transformer = modules["text_encoder"], modules["transformer"]
    if plan.graph:
        transformer.compile_repeated_blocks()

    def listen(scene: Tensor) -> Tensor:
        ids = tokens[scene, torch.randint(CAPTIONS_PER_SCENE, (plan.batch,), device=device)]
        ids = torch.where((torch.rand(ids.shape, device=device) < UNKNOWN_WORD_SHARE) & (ids > 2), 2, ids)
        ids = torch.where(torch.rand(plan.batch, 1, device=device) < EMPTY_CAPTION_SHARE, empty, ids)
        heard = (ids != 0).long()
        embeds: Tensor = text_encoder(ids, heard).last_hidden_state * heard[..., None]
        return embeds

    def loss() -> Tensor:
        index = torch.randint(plan.num_clips, (plan.batch,), device=device)
        clean = clips.latents[index].float()
        noise = torch.randn_like(clean)
        sigma = torch.rand(plan.batch, device=device)
        sigma = networks.FLOW_SHIFT * sigma / (1 + (networks.FLOW_SHIFT - 1) * sigma)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        image = None
        if with_image:
            image = modules["image_encoder"](clips.first[index].float(), output_hidden_states=True).hidden_states[-2]
        given = torch.cat([noisy, clips.condition[index].float()], 1)
        velocity: Tensor = transformer(given, 1000 * sigma, listen(clips.scene[index]), image, return_dict=False)[0]
        return (velocity - (noise - clean)).square().mean()

    def save() -> None:
        weights = {key: {k: v.cpu() for k, v in module.state_dict().items()} for key, module in modules.items()}
        torch.save(weights, out / f"{name}.pt")

    losses = fit(out / name, plan, modules.values(), loss, save)
    networks.save_pipeline(out / f"tiny-wan-{name}", tokenizer(), vae, **modules)
    return losses


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, losses and diffusers folders")
    parser.add_argument("--stage", choices=("vae", "t2v", "i2v", "all"), default="all")
    parser.add_argument("--seconds", type=float, default=240, help="for each stage")
    parser.add_argument("--clips", type=int, default=65536, help="clips whose latents t2v and i2v train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graph, no compiled transformer")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, small enough for a CPU")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    graph = device == "cuda" and not options.eager
    if options.smoke:
        both = Plan(options.seconds, 9, 6, 3e-3, 6, NUM_FRAMES, device, graph)
        plans = {"vae": Plan(options.seconds, 6, 4, 2e-3, 6, 5, device, graph), "t2v": both, "i2v": both}
    else:
        both = Plan(options.seconds, 10**9, 256, 1e-3, options.clips, NUM_FRAMES, device, graph)
        vae = Plan(options.seconds, 10**9, 32, 2e-3, len(TRAINING), NUM_FRAMES, device, graph)
        plans = {"vae": vae, "t2v": both, "i2v": both}
    losses = {}
    for stage in plans if options.stage == "all" else [options.stage]:
        if stage == "vae":
            losses[stage] = train_vae(options.out, plans[stage])
        else:
            losses[stage] = train_transformer(options.out, plans[stage], with_image=stage == "i2v")
    return losses

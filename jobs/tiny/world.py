"""A world of one moving shape: its vocabulary, captions and renderer, and the judge that reads a clip back.

A clip is 17 frames of 64x64 pixels. A scene names its six attributes; everything else (where the shape starts, how the
caption is worded) is drawn at random. `HELD_OUT` scenes are kept from training. The judge is classical image analysis:
it knows the palette and the outlines of the shapes, and nothing of any model.
"""

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 64  # pixels, both sides
NUM_FRAMES = 17
START_JITTER = 3.0  # pixels around the centre, the same for every direction: the first frame does not tell it

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 210, 40)}
BACKGROUNDS = {"black": (10, 10, 10), "gray": (128, 128, 128), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x right, y down
SIZES = {"small": 7.0, "large": 11.0}  # radius, pixels
SPEEDS = {"slowly": 0.5, "quickly": 1.0}  # pixels per frame

SQUARE_HALF_SIDE = math.sqrt(math.pi) / 2  # of a square as large as the unit circle
TRIANGLE_RADIUS = 1.15  # from the centre to a corner, in units of the radius
AREA = {"circle": math.pi, "square": math.pi, "triangle": 0.75 * math.sqrt(3) * TRIANGLE_RADIUS**2}


@dataclass(frozen=True)
class Scene:
    """What a caption says and a judge reads; an empty string stands for what was not said or not seen."""

    colour: str
    background: str
    shape: str
    direction: str
    size: str
    speed: str


SCENES = [Scene(*values) for values in itertools.product(COLOURS, BACKGROUNDS, SHAPES, DIRECTIONS, SIZES, SPEEDS)]


def is_held_out(scene: Scene) -> bool:
    """True for 24 of the 144 combinations of colour, background, shape and direction; every pair of values trains."""
    colour, direction = list(COLOURS).index(scene.colour), list(DIRECTIONS).index(scene.direction)
    background, shape = list(BACKGROUNDS).index(scene.background), SHAPES.index(scene.shape)
    return (colour + direction) % 4 == 0 and (background + shape) % 3 != 2


HELD_OUT = [scene for scene in SCENES if is_held_out(scene)]
TRAINING = [scene for scene in SCENES if not is_held_out(scene)]

DIRECTION_WORDS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "to the top", "upwards"),
    "down": ("down", "to the bottom", "downwards"),
}
PATTERNS = (
    "a {size} {colour} {shape} moves {direction} {speed} on a {background} background",
    "a {size} {colour} {shape} moving {direction} {speed}, {background} background",
    "on a {background} background, a {size} {colour} {shape} slides {direction} {speed}",
    "{background} background: one {size} {shape}, {colour}, going {speed} {direction}",
    "the {shape} is {colour} and {size}, it moves {speed} {direction} in front of a {background} wall",
    "video of a {colour} {shape} that travels {speed} {direction} over {background}, {size} size",
    "a {colour} {shape} moves {direction} on a {background} background",
    "a {colour} {shape} moving {direction} on {background}",
    "on {background}, the {colour} {shape} goes {direction}",
    "{colour} {shape}, {background} background, moving {direction}",
)
CAPTIONS_PER_SCENE = len(PATTERNS) * 3


def caption(scene: Scene, wording: int) -> str:
    """One of the CAPTIONS_PER_SCENE ways to say `scene`; the last four patterns leave out size and speed."""
    values = vars(scene) | {"direction": DIRECTION_WORDS[scene.direction][wording % 3]}
    return PATTERNS[wording // 3 % len(PATTERNS)].format(**values)


def asked_for(prompt: str, scene: Scene) -> Scene:
    """`scene` with blanks for the size and the speed that `prompt` does not name."""
    return replace(
        scene,
        size=scene.size if scene.size in prompt else "",
        speed=scene.speed if scene.speed in prompt else "",
    )


def held_out_prompts(num_prompts: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """Prompts for scenes that never occur in training, all attributes spread evenly."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < num_prompts:
        scenes += rng.sample(HELD_OUT, len(HELD_OUT))
    return [(caption(scene, rng.randrange(CAPTIONS_PER_SCENE)), scene) for scene in scenes[:num_prompts]]


def scene_table(scenes: list[Scene]) -> Tensor:
    """(scenes, 11) float32: colour and background RGB in [-1, 1], shape index, direction x and y, radius, speed."""

    def row(scene: Scene) -> list[float]:
        rgb = [value / 127.5 - 1 for value in (*COLOURS[scene.colour], *BACKGROUNDS[scene.background])]
        return [
            *rgb,
            SHAPES.index(scene.shape),
            *DIRECTIONS[scene.direction],
            SIZES[scene.size],
            SPEEDS[scene.speed],
        ]

    return torch.tensor([row(scene) for scene in scenes])


def signed_distances(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels from the outline of each shape, negative inside: (3, ...) in the order of SHAPES."""
    circle = torch.sqrt(x * x + y * y + 1e-6) - radius
    square = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    sides = torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y)
    return torch.stack([circle, square, sides - 0.5 * TRIANGLE_RADIUS * radius])


def soft_coverage(distance: Tensor) -> Tensor:
    """How much of a pixel the shape covers, in [0, 1]: the outline is two pixels soft."""
    return (0.5 - distance / 2).clamp(0, 1)


def render(
    rows: Tensor, num_frames: int = NUM_FRAMES, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws rows of `scene_table`: clips (n, 3, frames, 64, 64) in [-1, 1], and the distance from the shape's outline
    (n, 1, frames, 64, 64) in pixels. Where the shape starts comes from `generator`."""
    device, n = rows.device, len(rows)
    colour, background = rows[:, 0:3, None, None, None], rows[:, 3:6, None, None, None]
    shape, heading, radius, speed = rows[:, 6].long(), rows[:, 7:9], rows[:, 9], rows[:, 10]
    start = IMAGE_SIZE / 2 + START_JITTER * (2 * torch.rand(n, 2, device=device, generator=generator) - 1)
    travel = speed[:, None] * torch.arange(num_frames, device=device)
    centre = start[:, :, None] + heading[:, :, None] * travel[:, None]  # (n, xy, frames)
    pixel = torch.arange(IMAGE_SIZE, device=device) + 0.5
    x = pixel - centre[:, 0, :, None, None]
    y = pixel[:, None] - centre[:, 1, :, None, None]
    distances = signed_distances(
        x.expand(-1, -1, IMAGE_SIZE, -1), y.expand(-1, -1, -1, IMAGE_SIZE), radius[:, None, None, None]
    )
    index = shape.view(1, n, 1, 1, 1).expand(1, *distances.shape[1:])
    distance = distances.gather(0, index)[0][:, None]
    return torch.lerp(background, colour, soft_coverage(distance)), distance


def to_pixels(clips: Tensor) -> Tensor:
    """(n, 3, frames, h, w) in [-1, 1] to (n, frames, h, w, 3) uint8."""
    return ((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def nearest(rgb: Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float((rgb - torch.tensor(palette[name])).square().sum()))


def judge(frames: Tensor) -> Scene:
    """Reads a clip (frames, 64, 64, 3) uint8 by its pixels alone: background from the border, colour from the pixels
    farthest from it, direction and speed from the path of the centroid, shape from the best of three outlines of equal
    area, size from that area."""
    video = frames.float()
    border = torch.cat([video[:, :2].flatten(0, 2), video[:, -2:].flatten(0, 2), video[:, :, :2].flatten(0, 2)])
    ground = border.median(0).values
    background = nearest(ground, BACKGROUNDS)
    contrast = (video - ground).square().sum(-1).sqrt()
    peak = contrast.flatten(1).topk(40).values[:, -1].median()
    if peak < 40:
        return Scene("", background, "", "", "", "")
    colour = nearest(video[contrast > 0.8 * peak].median(0).values, COLOURS)

    mask = (contrast > 0.5 * peak).float()
    area = mask.sum((1, 2)).clamp(min=1)
    pixel = torch.arange(IMAGE_SIZE) + 0.5
    centre_x, centre_y = (mask.sum(1) * pixel).sum(1) / area, (mask.sum(2) * pixel).sum(1) / area
    travel_x, travel_y = (
        float(centre_x[-3:].mean() - centre_x[:3].mean()),
        float(centre_y[-3:].mean() - centre_y[:3].mean()),
    )
    travel = max(abs(travel_x), abs(travel_y))
    if travel < 2:
        direction = speed = ""
    else:
        horizontal, vertical = ("right" if travel_x > 0 else "left"), ("down" if travel_y > 0 else "up")
        direction = horizontal if abs(travel_x) > abs(travel_y) else vertical
        pixels_per_frame = travel / (len(video) - 3)
        speed = min(SPEEDS, key=lambda name: abs(SPEEDS[name] - pixels_per_frame))

    x = (pixel - centre_x[:, None, None]).expand_as(mask)
    y = (pixel[:, None] - centre_y[:, None, None]).expand_as(mask)
    mismatch = {}
    for index, name in enumerate(SHAPES):
        radius = torch.sqrt(area / AREA[name])[:, None, None]
        outline = (signed_distances(x, y, radius)[index] < 0).float()
        mismatch[name] = float((outline - mask).abs().sum())
    shape = min(mismatch, key=lambda name: mismatch[name])
    measured_radius = float(torch.sqrt(area.median() / AREA[shape]))
    size = min(SIZES, key=lambda name: abs(SIZES[name] - measured_radius))
    return Scene(colour, background, shape, direction, size, speed)


ATTRIBUTES = ("colour", "background", "direction", "shape", "size", "speed")
CHANCE = {"colour": 1 / 4, "background": 1 / 3, "direction": 1 / 4, "shape": 1 / 3, "size": 1 / 2, "speed": 1 / 2}


def agreement(verdicts: list[Scene], asked: list[Scene]) -> dict[str, float]:
    """For each attribute the share of clips whose verdict is what was asked for, of those where it was asked."""
    shares = {}
    for name in ATTRIBUTES:
        pairs = [(getattr(v, name), getattr(a, name)) for v, a in zip(verdicts, asked, strict=True) if getattr(a, name)]
        shares[name] = sum(verdict == wish for verdict, wish in pairs) / len(pairs) if pairs else math.nan
    return shares


def contact_sheet(clips: Tensor, scale: int = 2) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Every fourth frame of clips (n, frames, h, w, 3) uint8, one row a clip, enlarged: (height, width, 3)."""
    frames = clips[:, ::4].cpu().float() / 255
    sheet = frames.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    return np.asarray(sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1), dtype=np.float32)

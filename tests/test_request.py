"""What a user may ask: defaults filled in, images made ready, everything else refused in one line."""

import itertools
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disagg_ray import InputError, Request, RequestError, load_config
from disagg_ray.config.schema import Config
from disagg_ray.request import MAX_SEED, ResolvedRequest, resolve
from disagg_ray.text import name_type, shown

CONF = Path(__file__).parent.parent / "conf"
T2V = load_config(CONF / "tiny_t2v.yaml")
I2V = load_config(CONF / "tiny_i2v.yaml")
FLF2V = load_config(CONF / "tiny_flf2v.yaml")
A14B = load_config(CONF / "tiny_a14b_t2v.yaml")
PUBLISHED = load_config(CONF / "wan21_i2v_14b_480p.yaml")
CAT = Request(prompt="a cat")
GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def accept(request: Request, config: Config = T2V) -> ResolvedRequest:
    return resolve(request, config)[0]


def refusal(request: Request, config: Config = T2V) -> str:
    """Return the message with which a request is refused."""
    with pytest.raises(RequestError) as caught:
        resolve(request, config)
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(image: Any, config: Config = I2V) -> Image.Image:
    """Return a first image as the model gets it."""
    return resolve(replace(CAT, image=image), config)[1]["image"]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds next to nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_what_is_left_out_comes_from_the_configuration() -> None:
    resolved, defaults = accept(CAT, A14B), A14B.defaults
    for f in fields(defaults):
        assert getattr(resolved, f.name) == getattr(defaults, f.name)
    assert (resolved.prompt, resolved.id, resolved.format, resolved.images) == ("a cat", CAT.id, "mp4", {})


def test_what_is_given_is_kept() -> None:
    given: dict[str, Any] = {
        "negative_prompt": "", "height": 32, "width": 80, "num_frames": 5, "num_inference_steps": 2,
        "guidance_scale": 0, "guidance_scale_2": 1.5, "seed": 0, "fps": 24, "format": "npy", "id": "mine",
    }  # fmt: skip
    resolved = accept(Request(prompt="a cat", **given), A14B)
    assert {name: getattr(resolved, name) for name in given} == given


def test_a_random_seed_is_in_the_resolved_request() -> None:
    seeds = {accept(CAT).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_requests_have_ids_of_their_own() -> None:
    assert Request(prompt="a").id != Request(prompt="a").id


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_the_outermost_seeds_are_accepted(seed: int) -> None:
    assert accept(replace(CAT, seed=seed)).seed == seed


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1.0, False), (1.01, True), (5, True)])
def test_guidance_runs_above_one(scale: float, guided: bool) -> None:
    assert accept(replace(CAT, guidance_scale=scale)).guided is guided


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "", ("must say what to show",)),
        ("prompt", " \n\t", ("must say what to show",)),
        ("prompt", "x" * 10_001, ("10001", "max_prompt_chars=10000", "32 tokens", "never cut off unseen")),
        ("prompt", "a \ud83d cat", ("half of a character",)),
        ("negative_prompt", "x" * 10_001, ("10001", "max_prompt_chars=10000", "32 tokens", "never cut off unseen")),
        ("height", 100, ("100", "multiple of 16", "nearest is 96")),
        ("height", 0, ("0", "nearest is 16")),
        ("height", -16, ("-16", "nearest is 16")),
        ("width", 250, ("250", "nearest is 256")),
        ("width", 0, ("0", "nearest is 16")),
        ("num_frames", 10, ("10", "4k + 1", "nearest is 9")),
        ("num_frames", 12, ("12", "nearest is 13")),
        ("num_frames", 0, ("0", "nearest is 1")),
        ("num_frames", -3, ("-3", "nearest is 1")),
        ("num_frames", 37, ("37", "max_frames=33")),
        ("num_inference_steps", 0, ("0", "at least 1")),
        ("num_inference_steps", -5, ("-5",)),
        ("num_inference_steps", 101, ("101", "max_steps=100")),
        ("guidance_scale", math.nan, ("nan", "finite")),
        ("guidance_scale", math.inf, ("inf", "finite")),
        ("guidance_scale", -math.inf, ("-inf", "finite")),
        ("guidance_scale", -0.5, ("-0.5", "at least 0")),
        ("guidance_scale", 10**400, ("finite",)),
        ("guidance_scale_2", 3.0, ("3.0", "one transformer")),
        ("seed", -1, ("-1", f"0 to {MAX_SEED}")),
        ("seed", MAX_SEED + 1, (str(MAX_SEED + 1),)),
        ("fps", 0, ("0", "1 to 240")),
        ("fps", 241, ("241", "1 to 240")),
        ("format", "avi", ("'avi'", "mp4, gif, frames, npy")),
        ("format", "", ("''",)),
        ("id", "", ("''", "1 to 200 printable characters")),
        ("id", "a\nb", ("printable",)),
        ("id", "x" * 201, ("1 to 200",)),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: Any, words: Sequence[str]) -> None:
    message = refusal(replace(CAT, **{field: value}))
    assert message.startswith(f"invalid {field}=")
    assert ": must " in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_the_second_guidance_is_checked_as_the_first(value: float) -> None:
    assert refusal(replace(CAT, guidance_scale_2=value), A14B).startswith(f"invalid guidance_scale_2={value}: must be")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", b"a cat"), ("prompt", ["a", "cat"]), ("negative_prompt", 3),
        ("height", "64"), ("height", 64.5), ("width", True), ("num_frames", np.True_), ("num_inference_steps", "4"),
        ("fps", math.inf), ("fps", math.nan), ("height", Fraction(129, 2)), ("guidance_scale", np.False_),
        ("guidance_scale", "5"), ("guidance_scale", True), ("guidance_scale_2", 1j), ("fps", 16.5),
        ("seed", True), ("seed", "7"), ("seed", 7.5), ("format", ["mp4"]), ("id", None), ("id", 7),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    message = refusal(replace(CAT, **{field: value}))
    assert message.startswith(f"invalid {field}={shown(value)}: must be ")
    assert message.endswith(f", not {name_type(value)}")


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        ("fps", 24.0, 24), ("fps", np.int64(24), 24), ("fps", np.uint8(24), 24), ("fps", np.float32(24), 24),
        ("seed", np.uint64(2**63 - 1), 2**63 - 1), ("height", 64.0, 64), ("num_frames", np.float64(9), 9),
        ("priority", -1.0, -1), ("width", Fraction(64), 64), ("width", np.array(64), 64),
        ("guidance_scale", np.float32(2.5), 2.5), ("guidance_scale", np.int8(3), 3), ("guidance_scale", 5.0, 5.0),
        ("guidance_scale", 5, 5), ("guidance_scale", Fraction(5, 2), 2.5), ("prompt", np.str_("a cat"), "a cat"),
    ],
)  # fmt: skip
def test_numbers_of_any_kind_become_python_s_own(field: str, value: Any, taken: Any) -> None:
    resolved = getattr(accept(replace(CAT, **{field: value})), field)
    assert (resolved, type(resolved)) == (taken, type(taken))


@pytest.mark.parametrize("field", ["seed", "fps", "guidance_scale", "priority"])
def test_a_number_too_large_to_be_printed_is_refused_by_name(field: str) -> None:
    assert refusal(replace(CAT, **{field: 10**5000})) == f"invalid {field}: must be a number of at most 8192 bits"


def test_a_size_over_the_limit_is_refused() -> None:
    message = refusal(replace(CAT, height=272, width=256))
    assert message == "invalid height x width=69632: must be at most limits.max_pixels=65536"


@pytest.mark.parametrize(
    ("format", "height", "width", "scale", "name"),
    [("mp4", 16, 16_400, 1, "width"), ("mp4", 57_600, 16, 1, "height"), ("mp4", 16, 4_112, 4, "width"),
     ("gif", 65_536, 16, 1, "height")],
)  # fmt: skip
def test_a_side_that_the_format_cannot_hold_is_refused(
    format: str, height: int, width: int, scale: int, name: str
) -> None:
    config = replace(T2V, limits=replace(T2V.limits, max_pixels=2**21), output=replace(T2V.output, scale=scale))
    request = replace(CAT, height=height, width=width, format=format)
    message = refusal(request, config)
    assert message.startswith(f"invalid {name}={max(height, width)}: must be at most ")
    assert f"that {format} can hold" in message
    accept(replace(request, format="frames"), config)


def test_a_gif_faster_than_browsers_show_is_refused() -> None:
    assert "must be at most 50" in refusal(replace(CAT, format="gif", fps=51))
    assert accept(replace(CAT, format="gif", fps=50)).fps == 50


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (T2V, {"image": GREY}, ("image: given", "t2v takes none")),
        (T2V, {"last_image": GREY}, ("last_image: given", "t2v takes none")),
        (I2V, {}, ("image: none given", "i2v needs one")),
        (I2V, {"image": GREY, "last_image": GREY}, ("last_image: given", "i2v takes none")),
        (FLF2V, {"image": GREY}, ("last_image: none given", "flf2v needs one")),
        (FLF2V, {"last_image": GREY}, ("image: none given", "flf2v needs one")),
        (FLF2V, {"image": GREY, "last_image": GREY, "num_frames": 1}, ("num_frames=1", "must be at least 5")),
    ],
)
def test_images_must_be_those_of_the_task(config: Config, given: dict[str, Any], words: Sequence[str]) -> None:
    message = refusal(replace(CAT, **given), config)
    assert all(word in message for word in words), message


def test_both_images_of_a_first_and_last_frame_model_are_resolved() -> None:
    resolved, images = resolve(replace(CAT, image=GREY, last_image=Image.new("RGB", (32, 80))), FLF2V)
    assert {n: (i.height, i.width) for n, i in resolved.images.items()} == {"image": (64, 64), "last_image": (80, 32)}
    assert images["last_image"].size == (32, 80)
    assert resolved.image_pixels == 64 * 64


@pytest.mark.parametrize("name", ["missing.png", ".", "", "a\0b.png", "x" * 300, "~nobody-of-that-name/first.png"])
def test_a_missing_image_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(replace(CAT, image=name), I2V).startswith("image: ")


@pytest.mark.parametrize("given", [7, b"first.png", np.zeros((8, 8, 3), np.uint8), ["first.png"]])
def test_an_image_of_another_type_is_refused(given: Any) -> None:
    message = refusal(replace(CAT, image=given), I2V)
    assert message.endswith(f"is a {type(given).__name__}; give a file or a PIL image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
def test_a_truncated_image_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"first.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"image: {str(path)!r} cannot be read as an image" in refusal(replace(CAT, image=path), I2V)


def test_a_lazily_opened_truncated_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with Image.open(path) as opened:
        assert "image: the image cannot be read as an image" in refusal(replace(CAT, image=opened), I2V)


@pytest.mark.parametrize("content", [b"", b"words", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"])
def test_what_is_no_image_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    path.write_bytes(content)
    assert f"image: {str(path)!r} cannot be read as an image" in refusal(replace(CAT, image=path), I2V)


def test_an_image_format_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    GREY.save(tmp_path / "first.pcx")
    assert "cannot be read as an image" in refusal(replace(CAT, image=tmp_path / "first.pcx"), I2V)


@pytest.mark.parametrize("size", [(2049, 2048), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "first.png"
    path.write_bytes(png_header(*size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail(f"decoded {image.size}"))
    assert "limits.max_image_pixels=4194304" in refusal(replace(CAT, image=path), I2V)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    with path.open("wb") as sparse:
        sparse.truncate(2**40)
    assert "give a smaller one" in refusal(replace(CAT, image=path), I2V)


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_an_empty_image_is_refused(size: tuple[int, int]) -> None:
    assert f"{size[0]}x{size[1]} pixels" in refusal(replace(CAT, image=Image.new("RGB", size)), I2V)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_an_image_without_a_range_is_refused(mode: str) -> None:
    assert "32-bit" in refusal(replace(CAT, image=Image.new(mode, (8, 8))), I2V)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16"])
def test_an_image_of_any_mode_becomes_rgb(mode: str) -> None:
    image = load(Image.new(mode, (32, 16)))
    assert (image.mode, image.size) == ("RGB", (32, 16))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_become_eight_without_clipping(suffix: str, tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / f"first.{suffix}")
    pixels = np.asarray(load(tmp_path / f"first.{suffix}"))
    assert (pixels == (grey >> 8)[..., None]).all()


def test_alpha_is_dropped_and_colour_kept() -> None:
    assert load(Image.new("RGBA", (16, 16), (200, 100, 50, 0))).getpixel((3, 3)) == (200, 100, 50)


def test_a_palette_s_colours_are_kept(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.gif")
    assert load(tmp_path / "p.gif").getpixel((3, 3)) == (200, 100, 50)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (31, 15)), (6, (15, 0)), (8, (0, 31))])
def test_exif_rotation_is_applied(orientation: int, corner: tuple[int, int], tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "first.png", exif=exif)
    upright = load(tmp_path / "first.png")
    assert upright.size == ((32, 16) if orientation < 5 else (16, 32))
    assert upright.getpixel(corner) == (255, 255, 255)


def test_the_size_follows_the_image_after_its_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 64)).save(tmp_path / "first.jpg", exif=exif)
    resolved = accept(replace(CAT, image=tmp_path / "first.jpg"), I2V)
    assert (resolved.height, resolved.width) == (80, 32)
    assert (resolved.images["image"].height, resolved.images["image"].width) == (128, 64)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((832, 480), (480, 832)),
        ((1664, 960), (480, 832)),
        ((480, 832), (832, 480)),
        ((1920, 1080), (464, 832)),
        ((1080, 1920), (832, 464)),
        ((1000, 1000), (624, 624)),
        ((1000, 100), (192, 1984)),
        ((100, 1000), (1984, 192)),
        ((4000, 40), (48, 6304)),
        ((40, 4000), (6304, 48)),
    ],
)
def test_the_size_follows_the_image_s_aspect_at_the_model_s_area(image: tuple[int, int], size: tuple[int, int]) -> None:
    resolved = accept(replace(CAT, image=Image.new("L", image), format="frames"), PUBLISHED)
    assert (resolved.height, resolved.width) == size


def test_no_aspect_that_is_taken_breaks_a_limit() -> None:
    config = replace(I2V, defaults=replace(I2V.defaults, height=256, width=256))
    sides = (1, 2, 3, 15, 16, 17, 31, 86, 100, 129, 257, 500, 895, 1000, 2047)  # 31 x 895 rounds up both ways
    for width, height in itertools.product(sides, sides):
        if max(width, height) > 100 * min(width, height):
            continue
        resolved = accept(replace(CAT, image=Image.new("L", (width, height))), config)
        assert min(resolved.height, resolved.width) >= 16
        assert resolved.height % 16 == resolved.width % 16 == 0
        assert resolved.height * resolved.width <= config.limits.max_pixels


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"height": 64}, (64, 128)),
        ({"width": 64}, (32, 64)),
        ({"height": 96, "width": 48}, (96, 48)),
        ({"height": 16}, (16, 32)),
        ({"width": 16}, (16, 16)),
    ],
)
def test_a_given_side_decides_the_other(given: dict[str, Any], size: tuple[int, int]) -> None:
    resolved = accept(replace(CAT, image=Image.new("L", (200, 100)), **given), I2V)
    assert (resolved.height, resolved.width) == size


@pytest.mark.parametrize("given", [{"height": 0}, {"width": 0}, {"height": -64}, {"width": 100}])
def test_a_wrong_side_is_refused_with_an_image_too(given: dict[str, Any]) -> None:
    ((field, value),) = given.items()
    assert refusal(replace(CAT, image=GREY, **given), I2V).startswith(
        f"invalid {field}={value}: must be a positive multiple of 16"
    )

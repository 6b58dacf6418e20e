"""Images are read as diffusers reads them, and nothing in a file breaks more than its request."""

import io
import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.utils import load_image as load_by_diffusers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from disagg_ray import Request, RequestError, load_config
from disagg_ray.media.video import IMAGE_FORMATS, load_image
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf"

RGBA = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 4), np.uint8))
RGB = RGBA.convert("RGB")
PALETTE = RGB.quantize(32)
EXIF = Image.Exif()
EXIF[0x0112] = 6

FILES: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "1.png": (RGB.convert("1"), {}),
    "L.png": (RGB.convert("L"), {}),
    "L_transparent.png": (RGB.convert("L"), {"transparency": 100}),
    "LA.png": (RGBA.convert("LA"), {}),
    "P.png": (PALETTE, {}),
    "P_transparent.png": (PALETTE, {"transparency": 3}),
    "P_alpha.png": (PALETTE, {"transparency": bytes(range(0, 256, 8))}),
    "P.gif": (PALETTE, {}),
    "P_transparent.gif": (PALETTE, {"transparency": 3}),
    "P_animated.gif": (PALETTE, {"save_all": True, "append_images": [PALETTE.rotate(180)]}),
    "RGB.png": (RGB, {"exif": EXIF}),
    "RGB_transparent.png": (RGB, {"transparency": (1, 2, 3)}),
    "RGB.bmp": (RGB, {}),
    "RGB.ppm": (RGB, {}),
    "RGBA.png": (RGBA, {}),
    "RGBA.webp": (RGBA, {"exif": EXIF}),
    "RGBA.avif": (RGBA, {}),
    "CMYK.jpg": (RGB.convert("CMYK"), {}),
    "CMYK.tiff": (RGB.convert("CMYK"), {}),
    "YCbCr.jpg": (RGB.convert("YCbCr"), {"exif": EXIF}),
    "YCbCr.tiff": (RGB.convert("YCbCr"), {}),
    "LZW.tiff": (RGB, {"compression": "tiff_lzw"}),
}
"""An image and how it is saved, by the file's name."""


def content(name: str) -> bytes:
    image, options = FILES[name]
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[Path(name).suffix], **options)
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_diffusers_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content(name))
    expected = load_by_diffusers(str(path))
    with Image.open(path) as opened:
        for image in (load_image(path, "image", 10**6), load_image(opened, "image", 10**6)):
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("head", [b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"<svg/>"])
def test_a_file_of_another_format_is_answered_with_those_that_are_read(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "first.jp2").write_bytes(head + bytes(100))
    with pytest.raises(RequestError, match=f"a whole file of {', '.join(IMAGE_FORMATS)}"):
        load_image(tmp_path / "first.jp2", "image", 10**6)


WHOLE = {name: content(name) for name in FILES}


@pytest.mark.proof
@settings(max_examples=3_000, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(0, 400), st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255)))),
    st.one_of(st.none(), st.integers(0, 2000)),
)
def test_a_mutated_file_is_an_image_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]], end: int | None
) -> None:
    data = bytearray(WHOLE[name])
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(data[:end])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = load_image(path, "image", 10**6)
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert (image.mode, image.width * image.height <= 10**6) == ("RGB", True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "kilobytes"


def test_a_broken_tiff_is_refused_in_one_line_and_libtiff_writes_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "first.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compression="tiff_lzw")
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + b"\xff" * 2000 + whole[4000:])
    with pytest.raises(RequestError, match="cannot be read as an image"):
        load_image(path, "image", 10**6)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("task", "thin"), [("i2v", "image"), ("flf2v", "image"), ("flf2v", "last_image")])
def test_an_image_that_clip_would_make_huge_is_refused(task: str, thin: str) -> None:
    """Its shorter side becomes 224 pixels before the longer one is cut: of 1 x 16,777,216 that would be 2.5 TB."""
    images = dict.fromkeys(("image", "last_image")[: 1 + (task == "flf2v")], Image.new("RGB", (64, 64)))
    request = Request("a boat", **{**images, thin: Image.new("RGB", (1, 200))})
    with pytest.raises(RequestError, match=f"invalid {thin}='1x200': must be at most 100 times as long as it is wide"):
        resolve(request, load_config(CONF / f"tiny_{task}.yaml"))

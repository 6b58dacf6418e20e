"""The page in a real browser, of models that take files, and of those that make images."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import helpers
import http_load
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from test_http_page import SURE_MS, browsing, drop, generate, serving, shoot

from disagg_ray.media.video import encode

pytestmark = pytest.mark.proof
LISTED = "fetch('/v1/videos').then(answer => answer.json()).then(list => list.data)"
SHOWN = "image => image.complete && [image.naturalWidth, image.naturalHeight]"


def test_a_video_its_mask_and_references_are_chosen_and_a_mask_alone_is_named(
    tmp_path: Path, image: Callable[..., Image.Image]
) -> None:
    frames = np.stack([image(96, 64, seed) for seed in range(5)]) / np.float32(255)
    (tmp_path / "clip.mp4").write_bytes(encode(frames, 8, "mp4"))
    for seed, name in enumerate(("mask", "one", "two")):
        image(96, 64, seed).save(tmp_path / f"{name}.png")
    with serving(tmp_path / "videos", "conf/tiny_vace.yaml", "defaults.num_frames=5") as place, browsing(place) as page:
        expect(page.get_by_label("First frame")).to_be_hidden()
        page.get_by_label("Mask").set_input_files(tmp_path / "mask.png")
        generate(page, "a boat", 2)
        expect(page.get_by_role("alert").first).to_contain_text("mask: given without video")
        expect(page.get_by_label("Mask")).to_be_focused()
        page.get_by_label("Control video").set_input_files(tmp_path / "clip.mp4")
        page.get_by_label("References").set_input_files([tmp_path / "one.png", tmp_path / "two.png"])
        expect(page.locator(".drop.chosen")).to_have_count(3)
        shoot(page, "control")
        generate(page, "a boat", 2)
        expect(page.locator(".card").first.locator("video")).to_be_visible(timeout=SURE_MS)
        (made,) = page.evaluate(LISTED)
        assert made["images"] == ["mask", "reference_images", "video"]
        assert (made["size"], made["settings"]["num_frames"]) == ("48x32", 5)  # at most the default area


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the page's address of a model that edits images."""
    with serving(tmp_path_factory.mktemp("images"), "conf/tiny_qwen_image_edit.yaml") as place:
        yield place


def test_an_image_is_dropped_edited_and_shown(place: str, tmp_path: Path, image: Callable[..., Image.Image]) -> None:
    image(64, 96).save(tmp_path / "cat.png")
    with browsing(place) as page:
        expect(page.get_by_label("Frames")).to_be_hidden()
        expect(page.locator("#first")).to_contain_text("Image")
        drop(page, "#first", "cat.png", (tmp_path / "cat.png").read_bytes())
        generate(page, "the cat wears a hat", 2)
        card = page.locator(".card").first
        expect(card.locator("img.made")).to_be_visible(timeout=SURE_MS)
        (made,) = page.evaluate(LISTED)
        assert made["object"] == "image"
        assert card.locator("img.made").evaluate(SHOWN) == [int(side) for side in made["size"].split("x")]
        expect(card.locator(".settings")).not_to_contain_text("frames")
        assert (card.locator(".download").get_attribute("download") or "").endswith(".png")
        expect(page.get_by_role("status")).to_contain_text("the image is ready")
        shoot(page, "image")
        card.get_by_role("button", name="Delete").click()
        expect(page.locator(".card")).to_have_count(0)


def test_an_image_that_nobody_waits_for_any_more_is_cancelled(
    place: str, tmp_path: Path, image: Callable[..., Image.Image]
) -> None:
    image(64, 64).save(tmp_path / "cat.png")
    picture = (tmp_path / "cat.png").read_bytes()
    fields = {"prompt": "a hat", "num_inference_steps": "100", "size": "256x256"}
    body = b"".join(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
                    for name, value in fields.items())  # fmt: skip
    body += b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + picture + b"\r\n--x--\r\n"

    def newest() -> dict[str, str]:
        with urllib.request.urlopen(f"{place}v1/videos?limit=1", timeout=60) as answer:
            return dict((json.load(answer)["data"] or [{"status": "none"}])[0])

    client = http.client.HTTPConnection(urlsplit(place).netloc, timeout=60)
    (computing,) = http_load.find(os.getpid(), ("ray::Transformer", "ray::transformer"))
    with helpers.stopped(computing.pid):  # or it might be done by then
        client.request("POST", "/v1/images/edits", body, {"Content-Type": "multipart/form-data; boundary=x"})
        helpers.wait_until(lambda: newest()["status"] in ("queued", "in_progress"), "it is not accepted", 240.0)
        client.close()
        helpers.wait_until(lambda: newest()["status"] in ("cancelling", "cancelled"), "it goes on", 240.0)
    helpers.wait_until(lambda: newest()["status"] == "cancelled", "it goes on", 240.0)

"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.proof
T2V = "conf/tiny_t2v.yaml"
SURE_MS = 90_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the page's address of `disagg-ray serve`."""
    folder, port = tmp_path_factory.mktemp("page"), helpers.free_port()
    command = [sys.executable, "-m", "disagg_ray.cli", "serve", "--config", T2V, "--port", str(port),
               f"service.folder={folder}"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        shown = next(line for line in child.stdout if line.startswith("page: "))
        yield shown.removeprefix("page: ").strip()
        child.terminate()
        assert child.wait(120) == 143


@pytest.fixture
def page(place: str) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(SURE_MS)
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.goto(place)
        yield opened
        assert not problems
        browser.close()


def generate(page: Page, prompt: str, steps: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")


def shoot(page: Page, name: str) -> None:
    """Keep a picture where somebody wants to look at it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_prompt_becomes_a_video_that_plays_to_its_end(page: Page) -> None:
    generate(page, "a red circle moves left on a white background", 60)
    card = page.locator(".card").first
    bar = card.locator(".stage", has_text="transformer").locator("progress")
    expect(bar).to_be_visible(timeout=SURE_MS)
    before = bar.evaluate("bar => bar.value")
    page.wait_for_function("before => document.querySelector('.stage.running progress')?.value > before", arg=before)
    shoot(page, "running")
    expect(card.locator("video")).to_be_visible(timeout=SURE_MS)
    ended = """video => new Promise(resolve => {
        video.loop = false; video.muted = true; video.onended = () => resolve(video.currentTime); video.play(); })"""
    assert card.locator("video").evaluate(ended) > 1
    expect(page.get_by_role("status")).to_contain_text("the video is ready")
    card.get_by_role("button", name="Again with this").click()
    assert page.get_by_label("Seed").input_value() == "7"
    shoot(page, "finished")


def test_a_job_is_cancelled_and_deleted(page: Page) -> None:
    generate(page, "a green square moves up on a black background", 100)
    card = page.locator(".card").first
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_have_class("card cancelled", timeout=SURE_MS)
    number = page.locator(".card").count()
    card.get_by_role("button", name="Delete").press("Enter")
    expect(page.locator(".card")).to_have_count(number - 1)
    assert page.evaluate("document.activeElement !== document.body")  # the keyboard goes on from there


def test_an_error_is_read_and_the_page_fits_a_phone_in_the_dark(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 375, "height": 800})
    page.get_by_label("Width").fill("1024")
    page.get_by_label("Height").fill("1024")
    generate(page, "a red circle", 2)
    expect(page.get_by_role("alert").first).to_contain_text("must be at most limits.max_pixels")
    expect(page.get_by_label("Width")).to_be_focused()
    expect(page.get_by_label("Width")).to_have_attribute("aria-invalid", "true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    shoot(page, "phone")


def test_the_keyboard_alone_reaches_the_form_whose_fields_have_names_and_show_their_focus(page: Page) -> None:
    name = "e => (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).trim()"
    reached = list[str]()
    page.get_by_role("link", name="API").focus()
    while "Generate" not in reached and len(reached) < 20:
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        reached.append(focused.evaluate(name))
        assert focused.evaluate("e => getComputedStyle(e).outlineStyle") != "none"
    assert reached == [
        "Prompt",
        "Negative prompt",
        "Width",
        "Height",
        "Frames",
        "Steps",
        "Guidance",
        "Seed",
        "Generate",
    ]

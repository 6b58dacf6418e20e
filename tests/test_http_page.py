"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import http_load
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect, sync_playwright

from disagg_ray.http.schema import StageProgress

pytestmark = pytest.mark.proof
T2V, FLF = "conf/tiny_t2v.yaml", "conf/tiny_flf2v.yaml"
SURE_MS = 180_000
expect.set_options(timeout=SURE_MS)


@contextmanager
def serving(folder: Path, config: str, *overrides: str) -> Iterator[str]:
    """Give the page's address of `disagg-ray serve`."""
    command = [sys.executable, "-m", "disagg_ray.cli", "serve", "--config", config, "--port", "0",
               f"service.folder={folder}", *overrides]  # fmt: skip
    with subprocess.Popen(command, env=http_load.environment(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        shown = next(line for line in child.stdout if line.startswith("page: "))
        try:
            yield shown.removeprefix("page: ").strip()
        finally:
            child.terminate()
        assert child.wait(120) == 143


@contextmanager
def browsing(place: str) -> Iterator[Page]:
    """Give a page in a browser; it must have met no error."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=SURE_MS)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(SURE_MS)
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.goto(place)
        opened.locator("#empty:not([hidden]), .card").first.wait_for()  # until it has listed the jobs that there are
        yield opened
        assert not problems
        browser.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("page"), T2V) as place:
        yield place


@pytest.fixture
def page(place: str) -> Iterator[Page]:
    with browsing(place) as page:
        yield page


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
    expect(bar).to_be_visible()
    before = bar.evaluate("bar => bar.value")
    page.wait_for_function(
        "before => document.querySelector('.stage[data-state=running] progress')?.value > before", arg=before
    )
    shoot(page, "running")
    expect(card.locator("video")).to_be_visible()
    ended = """video => new Promise(resolve => {
        video.loop = false; video.muted = true; video.onended = () => resolve(video.currentTime); video.play(); })"""
    assert card.locator("video").evaluate(ended) > 1
    expect(page.get_by_role("status")).to_contain_text("the video is ready")
    card.get_by_role("button", name="Again with this").click()
    assert page.get_by_label("Seed").input_value() == "7"
    shoot(page, "finished")


def test_of_many_jobs_one_waits_for_the_others_and_is_cancelled_and_deleted(page: Page) -> None:
    streams, most = set[Any](), [0]

    def opened(request: Any) -> None:
        streams.update({request} if request.url.endswith("/events") else ())
        most[0] = max(most[0], len(streams))

    def closed(request: Any) -> None:
        streams.discard(request)

    page.on("request", opened)
    page.on("requestfinished", closed)
    page.on("requestfailed", closed)
    cards = page.locator(".card")
    card, before = cards.first, cards.count()
    for number in range(before, before + 8):
        generate(page, "a green square moves up on a black background", 100)
        expect(cards).to_have_count(number + 1)
    expect(card.locator(".note")).to_contain_text("before it")
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_have_attribute("data-status", "cancelled")
    card.get_by_role("button", name="Delete").press("Enter")
    expect(cards).to_have_count(before + 7)
    assert page.evaluate("document.activeElement !== document.body")  # the keyboard goes on from there
    assert 0 < most[0] <= 3  # a browser opens six connections to one host
    page.evaluate("document.querySelectorAll('.cancel:not([hidden])').forEach(button => button.click())")
    expect(page.locator(".cancel:not([hidden])")).to_have_count(0)


def test_whatever_state_a_stage_is_in_it_covers_nothing_but_its_card(page: Page) -> None:
    states = get_args(StageProgress.model_fields["state"].annotation)

    def in_progress(route: Route) -> None:
        answer = route.fetch()
        listed = answer.json()
        listed["data"][0] |= {"status": "in_progress", "stages": [shown(state) for state in states]}
        route.fulfill(response=answer, json=listed)

    def shown(state: str) -> dict[str, Any]:
        return {"stage": state, "state": state, "step": 0, "steps": 0}

    generate(page, "a red circle", 2)
    expect(page.locator(".card").first.locator("video")).to_be_visible()
    page.route(re.compile(r"/v1/videos\?"), in_progress)
    page.route(re.compile("/v1/videos/"), lambda route: route.abort())
    page.reload()
    card = page.locator(".card").first
    expect(card.locator(".stage")).to_have_count(len(states))
    outside = """card => [...card.querySelectorAll("*")].filter(part => {
        const [own, whole] = [part.getBoundingClientRect(), card.getBoundingClientRect()];
        return own.height && (own.top < whole.top || own.bottom > whole.bottom || own.right > whole.right);
    }).map(part => part.outerHTML)"""
    assert card.evaluate(outside) == []
    shoot(page, "states")


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


def tab_to(page: Page, name: str) -> None:
    """Press Tab until what has a name is focused."""
    focused = "e => e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.locator(":focus").count() and page.locator(":focus").evaluate(focused).strip().startswith(name):
            return
    pytest.fail(f"Tab does not reach {name}")


def test_the_keyboard_alone_makes_a_video_and_deletes_it(page: Page) -> None:
    number = page.locator(".card").count()
    page.keyboard.type("a blue triangle")  # the prompt has the focus from the beginning
    for field, value in (("Frames", "5"), ("Steps", "2"), ("Seed", "1")):
        tab_to(page, field)
        page.keyboard.type(value)
    tab_to(page, "Generate")
    page.keyboard.press("Enter")
    card = page.locator(".card").first
    expect(card.locator(".prompt")).to_have_text("a blue triangle")
    expect(card.locator("video")).to_be_visible()
    tab_to(page, "Again with this")
    shoot(page, "keyboard")
    tab_to(page, "Delete")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(number)


def drop(page: Page, place: str, name: str, data: bytes) -> None:
    """Drop a file on a part of the page."""
    transfer = page.evaluate_handle(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name));
            return data; }""",
        [name, list(data)],
    )
    given: dict[str, Any] = {"dataTransfer": transfer}
    page.dispatch_event(place, "dragover", given)
    expect(page.locator(place)).to_have_class("drop over")
    page.dispatch_event(place, "drop", given)
    expect(page.locator(place)).to_have_class("drop chosen")


def test_an_image_is_chosen_another_dropped_and_a_file_that_is_none_named(
    tmp_path: Path, image: Callable[..., Image.Image]
) -> None:
    for name, seed in (("first", 0), ("last", 1)):
        image(64, 64, seed).save(tmp_path / f"{name}.png")
    with serving(tmp_path / "videos", FLF) as place, browsing(place) as page:
        page.get_by_label("First frame").set_input_files(tmp_path / "first.png")
        expect(page.locator("#first")).to_have_class("drop chosen")
        drop(page, "#last", "notes.txt", b"no image")
        generate(page, "it turns", 2)
        expect(page.get_by_role("alert").first).to_contain_text("'notes.txt' cannot be read as an image")
        expect(page.get_by_label("Last frame")).to_be_focused()
        shoot(page, "no image")
        page.get_by_label("Last frame").set_input_files([])
        drop(page, "#last", "last.png", (tmp_path / "last.png").read_bytes())
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 375, "height": 800})
        shoot(page, "images")
        generate(page, "it turns", 2)
        expect(page.locator(".card").first.locator("video")).to_be_visible()
        (made,) = page.evaluate("fetch('/v1/videos').then(answer => answer.json()).then(list => list.data)")
        assert (made["images"], made["settings"]["seed"]) == (["image", "last_image"], 7)

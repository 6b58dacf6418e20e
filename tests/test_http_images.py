"""Models that make images over HTTP: jobs, and OpenAI's images API, as its official client asks."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import helpers
import pytest
from http_client import client_of, jobs_of, ready
from openai import APIStatusError, OpenAI
from PIL import Image
from starlette.testclient import TestClient

from disagg_ray import Request, cli, connect, load_config
from disagg_ray.http.bodies import check_body
from disagg_ray.http.image_schema import OTHERS, CreateImage, EditImage, refuse_others
from disagg_ray.http.schema import ApiError, CreateVideo
from disagg_ray.http.settings import make_settings
from disagg_ray.http.store import Job

PICTURES, EDITS, BOTH = "pictures", "edits", "both"
TASKS = {PICTURES: "qwen_image", EDITS: "qwen_image_edit", BOTH: "qwen_image_edit_plus"}
SMALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 3}
HELLO: dict[str, Any] = {"prompt": "a red circle", "model": PICTURES, "size": "96x64"}
CONFIG = load_config(f"conf/tiny_{TASKS[PICTURES]}.yaml")

wait_until = partial(helpers.wait_until, timeout_s=240.0)


def test_an_image_has_no_length_and_a_format_that_is_served() -> None:
    asked = check_body(CreateVideo(prompt="a", format="webp"), {}, CONFIG, 0)
    assert (asked.settings["format"], asked.seconds, asked.length_s) == ("webp", "0", 0.0)
    assert "num_frames" not in asked.settings and "fps" not in asked.settings
    assert check_body(CreateVideo(prompt="a"), {}, CONFIG, 0).settings["format"] == "png"


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({"format": "npy"}, "format", "npy is not served; give png, webp, jpg"),
        ({"format": "mp4"}, "format", "this model makes images"),
        ({"seconds": "2"}, "seconds", "must be left out: models of model.family=qwen_image make images"),
        ({"num_frames": 1}, "num_frames", "make images"),
        ({"fps": 8}, "fps", "make images"),
    ],
)
def test_what_an_image_has_not_is_refused_by_field(given: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_body(CreateVideo(prompt="a", **given), {}, CONFIG, 0)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in caught.value.message


def test_a_video_is_served_as_mp4_only() -> None:
    with pytest.raises(ApiError, match="format: gif is not served; give mp4"):
        check_body(CreateVideo(prompt="a", format="gif"), {}, load_config("conf/tiny_t2v.yaml"), 0)


@pytest.mark.parametrize(
    "given",
    [{"n": 2}, {"quality": "hd"}, {"background": "transparent"}, {"style": "vivid"}, {"output_compression": 50},
     {"stream": True}, {"partial_images": 1}, {"input_fidelity": "high"}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_what_has_no_meaning_here_is_refused_with_what_to_do(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ApiError) as caught:
        refuse_others(EditImage(prompt="a", **given))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_value")
    assert caught.value.message.endswith(OTHERS[name][1])


def test_what_means_the_same_everywhere_is_taken() -> None:
    refuse_others(CreateImage(prompt="a", n=1, quality="auto", background="opaque", moderation="low", stream=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def http(cluster: None, folder: Path) -> Iterator[TestClient]:
    for name, kind in TASKS.items():
        assert cli.main(["up", name, "--config", f"conf/tiny_{kind}.yaml", "fused=true"]) == 0
    config = load_config(f"conf/tiny_{TASKS[PICTURES]}.yaml", f"service.folder={folder}")
    with ready(client_of(make_settings(tuple(TASKS), config)), 240.0) as client:
        yield client
    for name in TASKS:
        assert cli.main(["down", name]) == 0


@pytest.fixture
def openai(http: TestClient) -> OpenAI:
    return OpenAI(base_url="http://localhost:8000/v1", api_key="none", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def png(image: Callable[..., Image.Image]) -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        file = io.BytesIO()
        image(96, 64, seed).save(file, "PNG")
        return file.getvalue()

    return make


def expect(model: str, **asked: Any) -> bytes:
    """Return the image that Python makes."""
    with connect(model) as service:
        data = service.generate(Request(**(SMALL | asked))).data
    assert data is not None
    return data


def finish(http: TestClient, job_id: str) -> dict[str, Any]:
    place = f"/v1/videos/{job_id}"
    wait_until(lambda: http.get(place).json()["status"] in ("completed", "failed", "cancelled"), "it never ends")
    return dict(http.get(place).json())


@pytest.mark.proof
@pytest.mark.parametrize(
    ("given", "format", "media"),
    [({}, "png", "image/png"), ({"format": "webp"}, "webp", "image/webp"), ({"format": "jpg"}, "jpg", "image/jpeg")],
    ids=["png", "webp", "jpg"],
)
def test_a_job_makes_the_image_that_python_makes(
    http: TestClient, folder: Path, given: dict[str, str], format: str, media: str
) -> None:
    made = http.post("/v1/videos", json=HELLO | SMALL | given).json()
    assert (made["object"], made["id"][:6], made["settings"]["format"]) == ("image", "image_", format)
    assert finish(http, made["id"])["status"] == "completed"
    content = http.get(f"/v1/videos/{made['id']}/content")
    assert content.headers["Content-Type"] == media
    assert content.content == expect(PICTURES, prompt=HELLO["prompt"], width=96, height=64, format=format)
    thumbnail = http.get(f"/v1/videos/{made['id']}/content", params={"variant": "thumbnail"})
    assert thumbnail.headers["Content-Type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (96, 64)
    other = http.post(f"/v1/videos/{made['id']}/remix", json={"prompt": HELLO["prompt"]}).json()
    finish(http, other["id"])
    assert http.get(f"/v1/videos/{other['id']}/content").content == content.content
    assert [http.delete(f"/v1/videos/{each['id']}").json()["object"] for each in (made, other)] == ["image.deleted"] * 2
    wait_until(lambda: not list(folder.glob(f"{made['id']}*")), "files stay")


@pytest.mark.proof
def test_models_say_what_they_make_and_which_files_they_take(http: TestClient) -> None:
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert {model["makes"] for model in models.values()} == {"image"}
    assert [models[name]["files"] for name in TASKS] == [[], ["input_reference"], ["reference_images"]]


@pytest.mark.proof
def test_the_official_client_generates_an_image(http: TestClient, openai: OpenAI) -> None:
    made = openai.images.generate(**HELLO, n=1, quality="auto", background="auto", user="u", extra_body=SMALL)
    assert made.data is not None and made.size == "96x64" and made.output_format == "png"
    expected = expect(PICTURES, prompt=HELLO["prompt"], width=96, height=64)
    assert base64.b64decode(made.data[0].b64_json or "") == expected
    linked = openai.images.generate(**HELLO, response_format="url", extra_body=SMALL)
    assert linked.data is not None and linked.data[0].url is not None
    assert http.get(linked.data[0].url).content == expected
    plain = openai.images.generate(prompt="two", model=PICTURES, size="auto", output_format="jpeg", extra_body=SMALL)
    assert plain.data is not None
    assert Image.open(io.BytesIO(base64.b64decode(plain.data[0].b64_json or ""))).format == "JPEG"


@pytest.mark.proof
def test_the_official_client_edits_one_and_several_images(openai: OpenAI, png: Callable[[int], bytes]) -> None:
    files = [(f"{seed}.png", png(seed), "image/png") for seed in range(2)]
    images = [Image.open(io.BytesIO(png(seed))) for seed in range(2)]
    one = openai.images.edit(prompt="blue", model=EDITS, image=files[0], extra_body=SMALL)
    two = openai.images.edit(prompt="blue", model=BOTH, image=files, extra_body=SMALL)
    expected = expect(EDITS, prompt="blue", image=images[0]), expect(BOTH, prompt="blue", reference_images=images)
    for made, data in zip((one, two), expected, strict=True):
        assert made.data is not None
        assert base64.b64decode(made.data[0].b64_json or "") == data


@pytest.mark.proof
def test_what_cannot_be_edited_is_refused_by_the_names_of_that_api(
    openai: OpenAI, png: Callable[[int], bytes], folder: Path
) -> None:
    file = ("a.png", png(0), "image/png")
    before = set(folder.glob("image_*"))
    for asked, param, says in (
        ({"model": EDITS, "image": [file, file]}, "image", "2 were sent, and the model takes one"),
        ({"model": BOTH, "image": [file] * 5}, "image", "image: 5 were sent, and the model takes at most 4"),
        ({"model": EDITS, "image": ("a.png", b"none")}, "image", "image: 'a.png' cannot be read as an image"),
        ({"model": PICTURES, "image": file}, "image", "image: given, but a model of task t2i takes none"),
        ({"model": EDITS, "image": file, "mask": file}, "mask", "mask: given, but a model of task edit takes none"),
        ({"model": EDITS, "image": file, "n": 2}, "n", "one image a request is made"),
    ):
        with pytest.raises(APIStatusError) as caught:
            openai.images.edit(prompt="blue", **asked)  # type: ignore[arg-type]
        assert (caught.value.status_code, getattr(caught.value, "param", None)) == (400, param)
        assert says in caught.value.message
    assert set(folder.glob("image_*")) == before


@pytest.mark.proof
def test_the_same_checks_hold_as_for_jobs(http: TestClient) -> None:
    for given, status, param in (
        ({"size": "50x64"}, 400, "size"),
        ({"model": "none"}, 404, "model"),
        ({"model": EDITS}, 400, "image"),
        ({"steps": 3}, 400, "steps"),
        ({"prompt": ""}, 400, "prompt"),
    ):
        answer = http.post("/v1/images/generations", json=HELLO | given)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    late = http.post("/v1/images/generations", json=HELLO | {"num_inference_steps": 100, "deadline_s": 0.01})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false"


@pytest.mark.proof
def test_a_repeated_request_is_the_same_job(http: TestClient) -> None:
    header = {"Idempotency-Key": "image"}
    first, second = (http.post("/v1/images/generations", json=HELLO | SMALL, headers=header) for _ in range(2))
    assert first.json() == second.json()
    other = http.post("/v1/images/generations", json=HELLO | SMALL | {"seed": 4}, headers=header)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.proof
def test_an_image_whose_client_goes_while_it_is_accepted_is_cancelled(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, asked, gone, accepted = jobs_of(http), threading.Event(), threading.Event(), list[Job]()
    accept = jobs.accept

    def accept_late(*given: Any) -> Job:
        asked.set()
        assert gone.wait(120)
        accepted.append(accept(*given))
        return accepted[0]

    body = json.dumps(HELLO | SMALL | {"num_inference_steps": 100}).encode()
    place = "/v1/images/generations"
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": place,
             "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1)}  # fmt: skip
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()  # its client says nothing more

    async def send(_: Any) -> None:
        pass

    async def hang_up() -> None:
        """Ask and cancel, as Serve does with the request of a client that is gone."""
        asking = asyncio.create_task(cast("Any", http.app)(scope, receive, send))
        assert await asyncio.to_thread(asked.wait, 120)
        asking.cancel()
        await asyncio.wait([asking])
        gone.set()

    monkeypatch.setattr(jobs, "accept", accept_late)
    assert http.portal is not None
    http.portal.call(hang_up)
    wait_until(lambda: bool(accepted), "it is never accepted")
    assert finish(http, accepted[0].id)["status"] == "cancelled"

"""One HTTP service over two pipelines: each job goes to the one that it names, and neither waits for the other."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import helpers
import pytest
from http_client import client_of, ready
from PIL import Image
from starlette.testclient import TestClient

from disagg_ray import Request, cli, connect, load_config
from disagg_ray.errors import InputError
from disagg_ray.http.app import build_app
from disagg_ray.http.settings import make_settings

pytestmark = pytest.mark.proof

FILMS, SCENES = "films", "scenes"
CONFIGS = {FILMS: "conf/tiny_t2v.yaml", SCENES: "conf/tiny_i2v.yaml"}
SMALL: dict[str, Any] = {"prompt": "a red circle moves left", "num_frames": 5, "num_inference_steps": 2, "seed": 3}

wait_until = partial(helpers.wait_until, timeout_s=240.0)


def put_up(name: str) -> None:
    assert cli.main(["up", name, "--config", CONFIGS[name], "fused=true"]) == 0


@pytest.fixture(scope="module")
def http(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    for name in CONFIGS:
        put_up(name)
    config = load_config(CONFIGS[FILMS], f"service.folder={tmp_path_factory.mktemp('videos')}")
    with ready(client_of(make_settings(tuple(CONFIGS), config)), 240.0) as client:
        yield client
    for name in CONFIGS:
        assert cli.main(["down", name]) == 0


@pytest.fixture(scope="module")
def scene(image: Callable[..., Image.Image]) -> dict[str, Any]:
    """Give the body of a job of the model that takes an image."""
    file = io.BytesIO()
    image(64, 64).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return SMALL | {"model": SCENES, "input_reference": {"image_url": url}}


def post(http: TestClient, body: dict[str, Any]) -> str:
    answer = http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def content_of(http: TestClient, video_id: str) -> bytes:
    wait_until(lambda: http.get(f"/v1/videos/{video_id}").json()["status"] == "completed", "it never ends")
    return http.get(f"/v1/videos/{video_id}/content").content


def test_each_job_goes_to_the_model_that_it_names(
    http: TestClient, scene: dict[str, Any], image: Callable[..., Image.Image]
) -> None:
    made = [post(http, scene), post(http, SMALL | {"model": FILMS})]
    for video_id, name, images in zip(made, (SCENES, FILMS), ({"image": image(64, 64)}, {}), strict=True):
        with connect(name) as service:
            expected = service.generate(Request(**SMALL, **images))
        assert content_of(http, video_id) == expected.data
        assert http.get(f"/v1/videos/{video_id}").json()["model"] == name


def test_both_models_are_listed_with_what_they_take(http: TestClient) -> None:
    models = http.get("/v1/models").json()["data"]
    assert [(model["id"], model["task"]) for model in models] == [(FILMS, "t2v"), (SCENES, "i2v")]


@pytest.mark.parametrize(("model", "status"), [({}, 400), ({"model": "sora-2"}, 404)], ids=["missing", "unknown"])
def test_a_model_that_is_missing_or_unknown_is_answered_with_those_there_are(
    http: TestClient, model: dict[str, str], status: int
) -> None:
    answer = http.post("/v1/videos", json=SMALL | model)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], f"give one of {FILMS}, {SCENES}" in error["message"]) == (
        status, "model", True,
    )  # fmt: skip


def test_a_service_that_does_not_run_is_refused_by_name(http: TestClient) -> None:
    with pytest.raises(InputError, match=f"no service named 'none' in this cluster; running: {FILMS}, {SCENES}"):
        build_app(make_settings((FILMS, "none"), load_config(CONFIGS[FILMS])))


def test_a_model_that_is_down_holds_up_its_own_jobs_only_until_it_is_back(
    http: TestClient, scene: dict[str, Any]
) -> None:
    assert cli.main(["down", SCENES]) == 0
    wait_until(lambda: http.get("/ready").status_code == 503, "it counts as ready")
    assert http.get("/ready").json()["error"]["message"] == f"not ready: {SCENES}"
    waiting = post(http, scene | {"seed": 4})
    assert content_of(http, post(http, SMALL | {"model": FILMS, "seed": 4})) != b""
    assert http.get(f"/v1/videos/{waiting}").json()["status"] == "queued"
    put_up(SCENES)
    assert content_of(http, waiting) != b""

"""OpenAI's videos API over a service: what its official client asks, what is refused, what a restart finds."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import http_client
import pytest
from http_client import jobs_of, ready
from openai import OpenAI
from PIL import Image
from starlette.testclient import TestClient

from disagg_ray import Request, cli, connect, load_config
from disagg_ray.http.bodies import Upload, check_body, fingerprint
from disagg_ray.http.guard import FORM_BYTES
from disagg_ray.http.keys import Key, add_key
from disagg_ray.http.metrics import read
from disagg_ray.http.schema import ApiError, CreateVideo

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]

T2V = "conf/tiny_t2v.yaml"
MODEL = "films"
SMALL = {"prompt": "a red circle moves left", "num_frames": 5, "num_inference_steps": 2, "seed": 3}
LONG = SMALL | {"num_frames": 33, "num_inference_steps": 100, "size": "128x128"}

wait_until = partial(helpers.wait_until, timeout_s=240.0)
serve = partial(http_client.serve, MODEL, T2V)


@pytest.fixture(scope="module")
def model(cluster: None) -> Iterator[str]:
    assert cli.main(["up", MODEL, "--config", T2V, "fused=true"]) == 0
    yield MODEL
    assert cli.main(["down", MODEL]) == 0


@pytest.fixture(scope="module")
def http(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with ready(serve(tmp_path_factory.mktemp("videos")), 240.0) as client:
        yield client


@pytest.fixture
def openai(http: TestClient) -> OpenAI:
    return OpenAI(base_url="http://localhost:8000/v1", api_key="none", http_client=http)


def post(http: TestClient, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = http.post("/v1/videos", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def finish(http: TestClient, video_id: str, **headers: str) -> dict[str, Any]:
    """Wait until a job has ended; return it."""
    found: dict[str, Any] = {}

    def look() -> bool:
        found.update(http.get(f"/v1/videos/{video_id}", headers=headers).json())
        return found["status"] in ("completed", "failed", "cancelled")

    wait_until(look, f"{video_id} never ended")
    return found


def test_the_official_client_makes_finds_and_deletes_a_video(openai: OpenAI, model: str) -> None:
    more = {"num_inference_steps": 2, "seed": 3}
    asked: dict[str, Any] = {"prompt": SMALL["prompt"], "model": model, "seconds": "1", "size": "64x64"}
    video = openai.videos.create_and_poll(**asked, extra_body=more)
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1", "64x64")
    with connect(model) as service:
        same = service.generate(Request(SMALL["prompt"], num_frames=9, num_inference_steps=2, seed=3))
    assert openai.videos.download_content(video.id).read() == same.data
    thumbnail = openai.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (256, 256)
    other = openai.videos.remix(video.id, prompt="a blue triangle moves up")
    assert openai.videos.poll(other.id).remixed_from_video_id == video.id
    assert [each.id for each in openai.videos.list(limit=1)][:2] == [other.id, video.id]
    assert openai.videos.delete(video.id).deleted
    assert video.id not in [each.id for each in openai.videos.list()]


def test_defaults_follow_those_of_the_service(http: TestClient, model: str) -> None:
    def defaults() -> dict[str, Any]:
        return dict(http.get("/v1/models").json()["data"][0]["defaults"])

    before = defaults()
    for changed, fps in (["defaults.fps=12"], 12), ([], before["fps"]):
        assert cli.main(["up", model, "--config", T2V, "fused=true", *changed]) == 0
        wait_until(lambda fps=fps: defaults() == before | {"fps": fps}, "they stay")


def test_pages_follow_a_cursor_either_way(http: TestClient) -> None:
    made = [post(http, SMALL)["id"] for _ in range(3)]
    first = http.get("/v1/videos", params={"limit": 2}).json()
    assert ([video["id"] for video in first["data"]], first["has_more"]) == ([made[2], made[1]], True)
    after = http.get("/v1/videos", params={"limit": 1, "after": made[1]}).json()
    assert after["data"][0]["id"] == made[0]
    upwards = http.get("/v1/videos", params={"order": "asc", "after": made[1]}).json()
    assert ([video["id"] for video in upwards["data"]], upwards["has_more"]) == ([made[2]], False)


def test_a_stream_follows_the_steps_until_the_end(
    http: TestClient, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe, followed = jobs_of(http).subscribe, threading.Event()

    def note(*given: Any) -> Any:
        unsubscribe = subscribe(*given)
        followed.set()
        return unsubscribe

    def follow(video_id: str) -> list[str]:
        with http.stream("GET", f"/v1/videos/{video_id}/events") as stream:
            return [line for line in stream.iter_lines() if line.startswith(("event:", "data:"))]

    monkeypatch.setattr(jobs_of(http), "subscribe", note)
    with connect(model) as service:
        (replica,) = service.replicas
    with ThreadPoolExecutor(1) as thread:
        with helpers.stopped(replica.pid):  # or it might be done before it is followed
            following = thread.submit(follow, post(http, SMALL | {"num_inference_steps": 6})["id"])
            assert followed.wait(240)
        lines = following.result(240)
    events = [json.loads(line.removeprefix("data:")) for line in lines[1::2]]
    progress = [event["progress"] for event in events]
    assert (progress, progress[-1], lines[-2]) == (sorted(progress), 100, "event: completed")
    assert (
        len({stage["step"] for event in events for stage in event["stages"]}) > 1
    )  # those of a short time go together


def test_a_cancelled_job_ends_soon_and_has_no_content(http: TestClient) -> None:
    video_id = post(http, LONG)["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video_id}").json()["progress"] > 0, "never ran")
    assert http.post(f"/v1/videos/{video_id}/cancel").json()["status"] in ("cancelling", "cancelled")
    ended = finish(http, video_id)
    assert (ended["status"], ended["progress"] < 100) == ("cancelled", True)
    assert http.get(f"/v1/videos/{video_id}/content").status_code == 404
    assert http.post(f"/v1/videos/{video_id}/cancel").json()["status"] == "cancelled"


def test_a_deadline_fails_a_job_by_name_and_ends_its_run(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    ended = finish(http, post(http, LONG | {"deadline_s": 0.5})["id"])
    assert (ended["status"], ended["error"]["code"]) == ("failed", "deadline_exceeded")
    assert finish(http, post(http, SMALL)["id"])["status"] == "completed"
    assert "is run again" not in caplog.text


def test_a_repeated_post_is_the_same_job_and_another_body_is_refused(http: TestClient) -> None:
    header = {"Idempotency-Key": "one"}
    first = post(http, SMALL, **header)
    assert post(http, SMALL, **header)["id"] == first["id"]
    other = http.post("/v1/videos", json=SMALL | {"seed": 4}, headers=header)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_a_repeated_remix_is_the_same_job_though_its_source_is_gone(http: TestClient) -> None:
    source, header = post(http, SMALL)["id"], {"Idempotency-Key": "remix"}

    def remix(video_id: str, prompt: str) -> tuple[int, dict[str, Any]]:
        answer = http.post(f"/v1/videos/{video_id}/remix", json={"prompt": prompt}, headers=header)
        return answer.status_code, answer.json()

    made = remix(source, "a blue circle")[1]["id"]
    assert http.delete(f"/v1/videos/{source}").status_code == 200
    status, again = remix(source, "a blue circle")
    assert (status, again.get("id")) == (200, made), again
    assert [remix(*other)[0] for other in ((source, "a green circle"), (made, "a blue circle"))] == [409, 409]


def test_a_repeated_post_is_the_same_job_though_its_model_is_served_no_more(http: TestClient) -> None:
    body = SMALL | {"model": "gone"}
    made = jobs_of(http).find(Key(""), post(http, SMALL)["id"])
    old = {"id": "video_old", "model": "gone", "fingerprint": fingerprint(CreateVideo(**body), {})}
    with jobs_of(http).store.accepting("") as accepting:
        accepting.add(replace(made, status="completed", idempotency_key="gone", **old))
    assert post(http, body, **{"Idempotency-Key": "gone"})["id"] == "video_old"


def test_a_part_of_a_video_is_read_by_range(http: TestClient) -> None:
    video_id = post(http, SMALL)["id"]
    finish(http, video_id)
    place = f"/v1/videos/{video_id}/content"
    whole = http.get(place).content
    for header, part in (("bytes=0-9", whole[:10]), ("bytes=100-", whole[100:]), ("bytes=-7", whole[-7:])):
        answer = http.get(place, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, part)
    assert http.get(place, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


REFUSED = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "x " * 100}, 400, "prompt"),
    ({"model": "sora-2"}, 404, "model"),
    ({"size": "1280x720"}, 400, "size"),
    ({"size": "big"}, 400, "size"),
    ({"num_frames": None, "seconds": "600"}, 400, "seconds"),
    ({"num_frames": None, "seconds": "soon"}, 400, "seconds"),
    ({"seconds": "1"}, 400, "num_frames"),
    ({"guidance_scale_2": 1.0}, 400, "guidance_scale_2"),
    ({"input_reference": {"image_url": "data:image/png;base64,AAAA"}}, 400, "input_reference"),
    ({"input_reference": {"image_url": "http://169.254.169.254/"}}, 400, "input_reference"),
    ({"steps": 3}, 400, "steps"),
    ({"deadline_s": -1}, 400, "deadline_s"),
]


@pytest.mark.parametrize(("change", "status", "param"), REFUSED, ids=[str(change)[:30] for change, _, _ in REFUSED])
def test_what_cannot_be_served_is_refused_by_field(
    http: TestClient, change: dict[str, Any], status: int, param: str
) -> None:
    answer = http.post("/v1/videos", json=SMALL | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert param in error["message"]


def test_what_is_not_there_is_not_found(http: TestClient) -> None:
    for path in ("/v1/videos/video_none", "/v1/videos/video_none/content", "/v1/models/none", "/v1/none"):
        assert (http.get(path).status_code, "message" in http.get(path).json()["error"]) == (404, True)
    assert http.get("/v1/videos", params={"after": "video_none"}).json()["error"]["param"] == "after"
    variant = http.get("/v1/videos/x/content", params={"variant": "spritesheet"})
    assert (variant.status_code, variant.json()["error"]["param"]) == (400, "variant")


def test_another_machine_or_site_is_refused_without_keys_and_a_large_body_unread(http: TestClient) -> None:
    assert http.get("/v1/models", headers={"Host": "example.com"}).status_code == 403
    assert http.get("/v1/models", headers={"Origin": "http://example.com"}).status_code == 403
    unread = http.post("/v1/videos", content=b"", headers={"Content-Length": str(2**30)})
    assert (unread.status_code, unread.json()["error"]["code"]) == (413, "too_large")


def test_images_are_checked_as_everywhere_and_named_as_they_were_sent() -> None:
    config = load_config("conf/tiny_i2v.yaml")
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    body = CreateVideo(prompt="it moves")
    assert check_body(body, {"image": Upload("a.png", file.getvalue())}, config, 0).size == "64x64"
    with pytest.raises(ApiError, match=r"input_reference: image: 'a\.png' cannot be read as an image"):
        check_body(body, {"image": Upload("a.png", b"no image")}, config, 0)
    with pytest.raises(ApiError, match="input_reference: image: none given"):
        check_body(body, {}, config, 0)


def test_an_image_comes_in_a_form_and_an_unknown_file_is_refused(http: TestClient) -> None:
    png = base64.b64decode("iVBORw0KGgo=")
    answer = http.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", png)})
    assert "a model of task t2v takes none" in answer.json()["error"]["message"]
    answer = http.post("/v1/videos", data={"prompt": "x"}, files={"picture": ("a.png", png)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "picture")


def test_keys_keep_tenants_apart_and_within_their_limits_and_are_not_logged(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    caplog.set_level("DEBUG")
    alice, bob = (
        {"Authorization": f"Bearer {add_key(file, Key(name, **limits))}"}
        for name, limits in (("alice", {"max_in_flight": 1}), ("bob", {"seconds_a_day": 1.0}))
    )
    with serve(tmp_path / "videos", f"service.api_keys={file}", grace_s=0.0) as http:
        for wrong in ({}, {"Authorization": "Bearer sk-none"}, {"Authorization": "Basic x"}):
            assert http.get("/v1/videos", headers=wrong).status_code == 401
        video_id = post(http, LONG, **alice)["id"]
        busy = http.post("/v1/videos", json=SMALL, headers=alice)
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "too_many_in_flight")
        assert int(busy.headers["Retry-After"]) >= 1
        for call in (http.get, http.delete):
            assert call(f"/v1/videos/{video_id}", headers=bob).status_code == 404
        assert http.get("/v1/videos", headers=bob).json()["data"] == []
        post(http, SMALL, **bob)
        daily = http.post("/v1/videos", json=SMALL, headers=bob)
        assert (daily.status_code, daily.json()["error"]["code"]) == (429, "daily_limit")
        by_key = re.compile(r'disagg_ray_http_jobs_total\{.*key="(alice|bob)".*\} 1')
        wait_until(lambda: {*by_key.findall("\n".join(read()))} == {"alice", "bob"}, "jobs are not counted by key")
        told, counts = caplog.text + "\n".join(read()), http.get("/metrics").text
    assert "alice" not in counts and "bob" not in counts  # /metrics is read without a key
    assert re.search(r"disagg_ray_http_jobs_total\{.*\} ([2-9]|\d\d)", counts)
    assert not [key for key in (alice, bob) if key["Authorization"].split()[1] in told]


def test_a_service_that_ends_leaves_its_jobs_to_the_next(model: str, tmp_path: Path) -> None:
    with serve(tmp_path, grace_s=0.0) as http:
        made = [post(http, SMALL | {"num_inference_steps": 20, "seed": seed})["id"] for seed in range(3)]
    with serve(tmp_path) as http:
        assert [finish(http, video_id)["status"] for video_id in made] == ["completed"] * 3


def test_the_size_of_a_body_is_bounded_by_the_configuration(model: str, tmp_path: Path) -> None:
    with serve(tmp_path, "service.max_upload_bytes=10") as http:
        refused = http.post("/v1/videos", content=b"", headers={"Content-Length": str(FORM_BYTES + 11)})
    assert refused.status_code == 413
    assert "service.max_upload_bytes=10" in refused.json()["error"]["message"]


@pytest.mark.parametrize("limit", ["service.max_bytes=1", "service.expires_after_s=0.5"])
@pytest.mark.parametrize("scheme", ["", "local://"])
def test_expired_and_excess_videos_are_removed(scheme: str, limit: str, model: str, tmp_path: Path) -> None:
    database = f"service.database=sqlite:///{tmp_path}/jobs.db"
    with serve(tmp_path, limit, f"service.folder={scheme}{tmp_path}", database) as http:
        video_id = post(http, SMALL)["id"]
        finish(http, video_id)
        content = f"/v1/videos/{video_id}/content"
        wait_until(lambda: http.get(content).status_code == 404, "it stays")
        assert http.get(content).json()["error"]["code"] == "expired"
        wait_until(lambda: not list(tmp_path.glob("video*")), "its files stay")


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_videos_go_to_a_url_too_and_are_freed_there(scheme: str, model: str, tmp_path: Path) -> None:
    database = f"service.database=sqlite:///{tmp_path}/jobs.db"
    with serve(tmp_path, f"service.folder={scheme}{tmp_path}", database) as http:
        video_id = post(http, SMALL)["id"]
        assert finish(http, video_id)["status"] == "completed"
        content = f"/v1/videos/{video_id}/content"
        assert b"ftyp" in http.get(content).content[:12]
        assert http.get(content, params={"variant": "thumbnail"}).content[:4] == b"RIFF"
        assert http.delete(f"/v1/videos/{video_id}").status_code == 200
        assert http.get(content).status_code == 404
        wait_until(lambda: not list(tmp_path.glob("video*")), "its files stay")

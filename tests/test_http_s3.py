"""Videos of an HTTP service in S3: a real server of its protocol, in this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import helpers
import pytest
from http_client import client_of
from PIL import Image
from starlette.testclient import TestClient

from disagg_ray import cli, load_config
from disagg_ray.errors import OutputError
from disagg_ray.http.app import build_app
from disagg_ray.http.settings import make_settings

pytestmark = pytest.mark.proof

MODEL, T2V = "stored", "conf/tiny_t2v.yaml"
PLACE = "s3://films/all"
SMALL: dict[str, Any] = {"prompt": "a red circle moves left", "num_frames": 5, "num_inference_steps": 2, "seed": 3}

wait_until = partial(helpers.wait_until, timeout_s=240.0)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[], list[str]]]:
    """Give what lists the names of a bucket's objects; the environment says where its server is."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        storage = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        storage.mkdir("films")
        yield lambda: [Path(name).name for name in storage.find(PLACE)]
    server.stop()


@pytest.fixture(scope="module")
def model(cluster: None) -> Iterator[str]:
    assert cli.main(["up", MODEL, "--config", T2V, "fused=true"]) == 0
    yield MODEL
    assert cli.main(["down", MODEL]) == 0


def serve(database: Path, *overrides: str) -> TestClient:
    config = load_config(T2V, f"service.folder={PLACE}", f"service.database=sqlite:///{database}/jobs.db", *overrides)
    return client_of(make_settings((MODEL,), config))


def make(http: TestClient) -> str:
    video_id = str(http.post("/v1/videos", json=SMALL).json()["id"])
    wait_until(lambda: http.get(f"/v1/videos/{video_id}").json()["status"] == "completed", "it never ends")
    return video_id


def test_a_video_is_kept_read_in_parts_and_deleted(model: str, bucket: Callable[[], list[str]], tmp_path: Path) -> None:
    with serve(tmp_path) as http:
        video_id = make(http)
        content = f"/v1/videos/{video_id}/content"
        whole = http.get(content).content
        assert (whole[4:8], bucket()) == (b"ftyp", [f"{video_id}.mp4"])
        for header, part in (("bytes=0-9", whole[:10]), ("bytes=100-", whole[100:]), ("bytes=-7", whole[-7:])):
            answer = http.get(content, headers={"Range": header})
            assert (answer.status_code, answer.content) == (206, part)
        thumbnail = http.get(content, params={"variant": "thumbnail"}).content
        assert Image.open(io.BytesIO(thumbnail)).size == (256, 256)
        assert http.delete(f"/v1/videos/{video_id}").status_code == 200
        assert (http.get(content).status_code, bucket()) == (404, [])


def test_another_process_finds_the_videos(model: str, bucket: Callable[[], list[str]], tmp_path: Path) -> None:
    with serve(tmp_path) as http:
        video_id = make(http)
    with serve(tmp_path) as http:
        assert http.get(f"/v1/videos/{video_id}/content").content[4:8] == b"ftyp"
        http.delete(f"/v1/videos/{video_id}")
    assert bucket() == []


@pytest.mark.parametrize("limit", ["service.max_bytes=1", "service.expires_after_s=0.5"])
def test_expired_and_excess_videos_are_removed(
    limit: str, model: str, bucket: Callable[[], list[str]], tmp_path: Path
) -> None:
    with serve(tmp_path, limit) as http:
        content = f"/v1/videos/{make(http)}/content"
        wait_until(lambda: http.get(content).status_code == 404, "it stays")
        assert http.get(content).json()["error"]["code"] == "expired"
        wait_until(lambda: bucket() == [], "its files stay")


def test_a_bucket_that_is_not_there_is_refused(bucket: Callable[[], list[str]], tmp_path: Path, model: str) -> None:
    config = load_config(T2V, "service.folder=s3://none/x", f"service.database=sqlite:///{tmp_path}/jobs.db")
    with pytest.raises(OutputError, match=r"^service\.folder: 's3://none/x/probe\.mp4' cannot be written"):
        build_app(make_settings((MODEL,), config))

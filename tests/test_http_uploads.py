"""Files of a request over HTTP: a control video, its mask and references, kept as long as their job and no longer."""

from __future__ import annotations

import base64
import io
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import http_client
import numpy as np
import pytest
from http_client import ready
from PIL import Image
from starlette.testclient import TestClient

from disagg_ray import Request, cli, connect, load_config
from disagg_ray.http.bodies import Upload, check_body
from disagg_ray.http.files import by_field
from disagg_ray.http.keys import Key, add_key
from disagg_ray.http.schema import ApiError, CreateVideo
from disagg_ray.media.video import encode

MODEL, VACE = "controlled", "conf/tiny_vace.yaml"
OWN = ("model.max_sequence_length=64", "limits.max_pixels=9216", "limits.max_frames=9", "defaults.height=64",
       "defaults.width=96", "defaults.num_frames=5", "limits.max_image_pixels=20000")  # fmt: skip
CONFIG = load_config(VACE, *OWN)
SMALL: dict[str, Any] = {"prompt": "a boat", "num_inference_steps": 2, "seed": 3, "conditioning_scale": 0.5}

wait_until = partial(helpers.wait_until, timeout_s=240.0)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sent(image: Callable[..., Image.Image]) -> dict[str, bytes]:
    """Give files by their places: a video of five frames, a mask of one image, two references."""
    frames = np.stack([image(96, 64, seed) for seed in range(5)]) / np.float32(255)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (10, 10, 60, 40))
    references = {f"reference_images[{n}]": png(image(40, 30, n)) for n in range(2)}
    return {"video": encode(frames, 8, "mp4"), "mask": png(mask), **references}


def form_of(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [(place.partition("[")[0], (f"{place}.bin", data)) for place, data in files.items()]


def bomb() -> bytes:
    return png(Image.new("L", (2000, 2000)))


REFUSED: dict[str, tuple[dict[str, bytes], str, str]] = {
    "a text": ({"video": b"no video"}, "video", "'a.bin' cannot be read as a video; give a whole mp4"),
    "nothing": ({"reference_images[0]": b""}, "reference_images", "'a.bin' cannot be read as an image"),
    "a bomb": ({"reference_images[1]": bomb()}, "reference_images", "limits.max_image_pixels=20000"),
    "a bomb of a mask": ({"mask": bomb()}, "mask", "limits.max_image_pixels=20000"),
    "too many": ({f"reference_images[{n}]": b"" for n in range(5)}, "reference_images", "5 were sent, and the model"),
    "an image for another task": ({"image": b""}, "input_reference", "a model of task vace takes none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_by_its_field_and_leaves_no_file(
    sent: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changes, param, says = REFUSED[case]
    uploads = {place: Upload("a.bin", data) for place, data in (sent | changes).items()}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ApiError) as caught:
        check_body(CreateVideo(**SMALL), uploads, CONFIG, 0)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in caught.value.message and str(tmp_path) not in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0.1, 0.6, 0.999])
def test_a_truncated_mp4_is_refused(sent: dict[str, bytes], kept: float) -> None:
    cut = sent["video"][: int(kept * len(sent["video"]))]
    with pytest.raises(ApiError, match=r"^video: 'clip\.mp4' cannot be read as a video"):
        check_body(CreateVideo(**SMALL), {"video": Upload("clip.mp4", cut)}, CONFIG, 0)


def test_size_and_frames_follow_the_video_unless_they_are_given(sent: dict[str, bytes]) -> None:
    uploads = {"video": Upload("a.mp4", sent["video"])}
    for given, size, num_frames in (({}, "96x64", 5), ({"size": "48x32", "num_frames": 1}, "48x32", 1)):
        asked = check_body(CreateVideo(**SMALL, **given), uploads, CONFIG, 0)
        assert (asked.size, asked.settings["num_frames"]) == (size, num_frames)
        assert asked.settings["conditioning_scale"] == 0.5


def test_files_of_a_list_keep_their_order() -> None:
    files = {f"reference_images[{n}]": n for n in (10, 2, 0, 1)} | {"mask": "m"}
    assert by_field(files) == {"mask": "m", "reference_images": [0, 1, 2, 10]}


@pytest.fixture(scope="module")
def model(cluster: None, checkpoint: Callable[[str], Path]) -> Iterator[str]:
    path = f"model.path={checkpoint('tiny-vace')}"
    assert cli.main(["up", MODEL, "--config", VACE, path, "fused=true", *OWN]) == 0
    yield MODEL
    assert cli.main(["down", MODEL]) == 0


def serve(folder: Path, *overrides: str, grace_s: float = 30.0) -> TestClient:
    return http_client.serve(MODEL, VACE, folder, *OWN, *overrides, grace_s=grace_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def http(model: str, folder: Path) -> Iterator[TestClient]:
    with ready(serve(folder), 240.0) as client:
        yield client


def post(http: TestClient, files: dict[str, bytes], **headers: str) -> dict[str, Any]:
    answer = http.post("/v1/videos", data=SMALL, files=form_of(files), headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def finish(http: TestClient, video_id: str, **headers: str) -> bytes:
    """Wait until a job has ended; return its video."""
    place = f"/v1/videos/{video_id}"
    ended = ("completed", "failed", "cancelled")
    wait_until(lambda: http.get(place, headers=headers).json()["status"] in ended, f"{video_id} never ended")
    answer = http.get(f"{place}/content", headers=headers)
    assert answer.status_code == 200, http.get(place, headers=headers).text
    return answer.content


@pytest.fixture(scope="module")
def expected(model: str, sent: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give the video that the same request makes through Python."""
    files = tmp_path_factory.mktemp("files")
    for place, data in sent.items():
        (files / place).write_bytes(data)
    with connect(model) as service:
        made = service.generate(Request(**SMALL, **by_field({place: files / place for place in sent})))
    assert made.data is not None
    return made.data


def upload_names(folder: Path) -> set[str]:
    return {path.name.partition(".")[2] for path in folder.glob("video_*")} - {"mp4", "webp"}


@pytest.mark.proof
def test_uploads_make_the_video_that_python_makes_and_a_remix_has_them_too(
    http: TestClient, sent: dict[str, bytes], folder: Path, expected: bytes
) -> None:
    made = post(http, sent)
    assert finish(http, made["id"]) == expected
    assert made["images"] == ["mask", "reference_images", "video"]
    assert made["settings"]["conditioning_scale"] == 0.5
    assert upload_names(folder) == {"video", "mask", "reference_images.0", "reference_images.1"}
    other = http.post(f"/v1/videos/{made['id']}/remix", json={"prompt": SMALL["prompt"]}).json()
    assert http.delete(f"/v1/videos/{made['id']}").status_code == 200
    assert finish(http, other["id"]) == expected
    assert http.delete(f"/v1/videos/{other['id']}").status_code == 200
    wait_until(lambda: not list(folder.glob("video_*")), "files stay")


@pytest.mark.proof
def test_json_and_the_official_client_s_names_of_lists_are_the_same(
    http: TestClient, sent: dict[str, bytes], expected: bytes
) -> None:
    urls = {place: f"data:;base64,{base64.b64encode(data).decode()}" for place, data in sent.items()}
    body: dict[str, Any] = {"video": {"video_url": urls["video"]}, "mask": {"image_url": urls["mask"]}}
    body["reference_images"] = [{"image_url": urls[f"reference_images[{n}]"]} for n in range(2)]
    answer = http.post("/v1/videos", json=SMALL | body)
    assert answer.status_code == 200, answer.text
    named = [(name.replace("images", "images[]"), file) for name, file in form_of(sent)]
    other = http.post("/v1/videos", data=SMALL, files=named)
    assert other.status_code == 200, other.text
    assert [finish(http, each.json()["id"]) for each in (answer, other)] == [expected] * 2


@pytest.mark.proof
@pytest.mark.parametrize("case", REFUSED)
def test_a_form_is_refused_by_its_field_and_nothing_stays(
    http: TestClient, sent: dict[str, bytes], folder: Path, case: str
) -> None:
    changes, param, _ = REFUSED[case]
    before = {path.name for path in folder.glob("video_*")}
    files = [("input_reference" if name == "image" else name, file) for name, file in form_of(sent | changes)]
    answer = http.post("/v1/videos", data=SMALL, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    twice = http.post("/v1/videos", data=SMALL, files=[*form_of(sent), ("mask", ("a", b""))])
    assert (twice.status_code, twice.json()["error"]["message"]) == (400, "'mask': given twice")
    assert {path.name for path in folder.glob("video_*")} == before


@pytest.mark.proof
def test_uploads_of_a_job_that_the_database_refuses_do_not_stay(
    http: TestClient, sent: dict[str, bytes], folder: Path
) -> None:
    before = {path.name for path in folder.glob("video_*")}
    with closing(sqlite3.connect(folder / "jobs.db")) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON jobs BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
        answer = http.post("/v1/videos", data=SMALL, files=form_of(sent))
        database.execute("DROP TRIGGER full")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_failed")
    wait_until(lambda: {path.name for path in folder.glob("video_*")} == before, "uploads stay")
    assert finish(http, post(http, sent)["id"])


@pytest.mark.proof
def test_a_repeated_post_is_known_by_the_content_of_its_files(http: TestClient, sent: dict[str, bytes]) -> None:
    header = {"Idempotency-Key": "one"}
    first = post(http, sent, **header)
    assert post(http, sent, **header)["id"] == first["id"]
    turned = sent | {"reference_images[0]": sent["reference_images[1]"], "reference_images[1]": sent["mask"]}
    answer = http.post("/v1/videos", data=SMALL, files=form_of(turned), headers=header)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.proof
def test_files_outlive_a_restart_and_are_their_tenant_s_alone(
    model: str, sent: dict[str, bytes], tmp_path: Path, expected: bytes
) -> None:
    carol, dora = (
        {"Authorization": f"Bearer {add_key(tmp_path / 'keys.json', Key(name))}"} for name in ("carol", "dora")
    )
    keys = f"service.api_keys={tmp_path / 'keys.json'}"
    with serve(tmp_path, keys, grace_s=0.0) as http:
        made = [post(http, sent, **carol)["id"] for _ in range(3)]
    with serve(tmp_path, keys) as http:
        assert [finish(http, video_id, **carol) for video_id in made] == [expected] * 3
        refused = http.post(f"/v1/videos/{made[0]}/remix", json={"prompt": "mine"}, headers=dora)
        assert refused.status_code == 404
        for video_id in made:
            http.delete(f"/v1/videos/{video_id}", headers=carol)
        wait_until(lambda: not list(tmp_path.glob("video_*")), "files stay")


@pytest.mark.proof
@pytest.mark.parametrize("limit", ["service.max_bytes=1", "service.expires_after_s=0.5"])
def test_files_of_ended_jobs_expire_with_them(model: str, sent: dict[str, bytes], tmp_path: Path, limit: str) -> None:
    with serve(tmp_path, limit) as http:
        video_id, late = post(http, sent)["id"], post(http, sent)["id"]
        http.post(f"/v1/videos/{late}/cancel")
        wait_until(lambda: not list(tmp_path.glob("video_*")), "files stay")
        ended = [http.get(f"/v1/videos/{each}").json()["status"] for each in (video_id, late)]
        assert ended[0] == "completed" and ended[1] in ("cancelled", "completed")
        gone = http.post(f"/v1/videos/{video_id}/remix", json={"prompt": "again"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "expired")


@pytest.mark.proof
def test_the_description_of_the_api_has_the_files(http: TestClient) -> None:
    described = http.get("/openapi.json").json()
    contents = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    form = contents["multipart/form-data"]["schema"]["properties"]
    assert form["video"] == form["mask"] == {"type": "string", "format": "binary"}
    assert form["reference_images"] == {"type": "array", "items": form["video"]}
    assert "video_url" in contents["application/json"]["schema"]["properties"]["video"]["anyOf"][0]["properties"]
    assert "$ref" not in str(contents)
    assert http.get("/v1/models").json()["data"][0]["files"] == ["video", "mask", "reference_images"]

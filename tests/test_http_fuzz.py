"""Whatever is sent, the answer is in the API's form: no 500, no traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from disagg_ray import cli, load_config
from disagg_ray.http.app import build_app
from disagg_ray.http.settings import make_settings

pytestmark = pytest.mark.proof
MODEL, T2V = "fuzzed", "conf/tiny_t2v.yaml"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def http(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    overrides = ("fused=true", "limits.max_queued=2", f"service.folder={tmp_path_factory.mktemp('fuzz')}")
    assert cli.main(["up", MODEL, "--config", T2V, *overrides]) == 0
    config = load_config(T2V, *overrides)
    with TestClient(
        build_app(make_settings((MODEL,), config)), base_url="http://localhost", client=("127.0.0.1", 1)
    ) as client:
        yield client
        for video in client.get("/v1/videos", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/videos/{video['id']}")
    assert cli.main(["down", MODEL]) == 0


def check(answer: Any) -> None:
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]


def fields(http: TestClient) -> dict[str, Any]:
    """Return the body's schema of the API's own description."""
    schema = http.get("/openapi.json").json()
    return dict(schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"])


@FUZZ
@given(data=st.data())
def test_bodies_of_the_described_fields(http: TestClient, data: st.DataObject) -> None:
    names = list(fields(http)["properties"])
    body = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=5)) | {"prompt": data.draw(st.text())}
    text = json.dumps(body).encode(errors="replace")
    check(http.post("/v1/videos", content=text, headers={"Content-Type": "application/json"}))


@FUZZ
@given(body=st.binary(max_size=300), kind=st.sampled_from(["application/json", "multipart/form-data", "text/x",
       "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"]))  # fmt: skip
def test_bodies_of_any_bytes(http: TestClient, body: bytes, kind: str) -> None:
    check(http.post("/v1/videos", content=body, headers={"Content-Type": kind}))


@FUZZ
@given(data=st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=4), file=st.binary(max_size=100))
def test_forms(http: TestClient, data: dict[str, str], file: bytes) -> None:
    check(http.post("/v1/videos", data=data | {"prompt": "x"}, files={"input_reference": ("a", file)}))


@FUZZ
@given(
    video_id=st.text(max_size=40).filter(lambda text: "/" not in text),
    what=st.sampled_from(["", "/content", "/events", "/cancel", "/remix"]),
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    query=st.dictionaries(st.sampled_from(["after", "limit", "order", "variant"]), st.text(max_size=10)),
)
def test_ids_and_queries(http: TestClient, video_id: str, what: str, method: str, query: dict[str, str]) -> None:
    from urllib.parse import quote

    check(http.request(method, f"/v1/videos/{quote(video_id, errors='replace')}{what}", params=query))
    check(http.get("/v1/videos", params=query))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", b"null", b"NaN"])
def test_bodies_that_break_parsers(http: TestClient, body: bytes, tmp_path: Path) -> None:
    answer = http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    check(answer)

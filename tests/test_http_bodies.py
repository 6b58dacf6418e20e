"""Bodies of requests as they are read: nothing that was sent is left out unseen, or taken for something else."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from disagg_ray.http.forms import read_body
from disagg_ray.http.schema import ApiError, CreateVideo

URL = "data:image/png;base64," + base64.b64encode(b"another").decode()
FILE, LINK = ('input_reference"; filename="a.png', "a file"), ("input_reference[image_url]", URL)


def read(body: str, kind: str) -> tuple[CreateVideo, dict[str, Any]]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body.encode(), "more_body": False}

    app = SimpleNamespace(state=SimpleNamespace(max_bytes=10_000))
    headers = [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b"", "app": app}
    return asyncio.run(read_body(Request(scope, receive), CreateVideo))


def read_form(*parts: tuple[str, str], end: str = "--x--\r\n") -> tuple[CreateVideo, dict[str, Any]]:
    head = 'Content-Disposition: form-data; name="'
    text = "".join(f'--x\r\n{head}{name}"\r\n\r\n{value}\r\n' for name, value in (("prompt", "a cat"), *parts))
    return read(f"{text}{end}", 'multipart/form-data; boundary="x"')


@pytest.mark.parametrize("parts", [(FILE, LINK), (LINK, FILE), (LINK, LINK), (FILE, FILE)])
def test_a_file_that_is_given_twice_is_refused(parts: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ApiError, match=r"'input_reference(\[image_url\])?': given twice"):
        read_form(*parts)


def test_a_file_or_a_url_of_one_is_read() -> None:
    assert [read_form(part)[1]["image"].data for part in (FILE, LINK)] == [b"a file", b"another"]


@pytest.mark.parametrize("end", ["", "--x", "--x\r\nContent-Disposition: form-data", "--"])
def test_a_form_that_ends_early_is_refused(end: str) -> None:
    with pytest.raises(ApiError, match="body: the form ends early"):
        read_form(FILE, end=end)
    with pytest.raises(ApiError, match="body: the form ends early"):
        read("", "multipart/form-data; boundary=x")


@pytest.mark.parametrize("end", ["--x--", "--x--\r\nan epilogue"])
def test_a_form_that_ends_is_whole(end: str) -> None:
    assert read_form(FILE, end=end)[1]["image"].data == b"a file"


def test_a_json_field_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ApiError, match="'seed': given twice"):
        read('{"prompt": "a cat", "seed": 1, "seed": 2}', "application/json")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_no_text_holds_a_nul(field: str) -> None:
    with pytest.raises(ApiError, match=f"{field}: .*must hold no NUL"):
        read(json.dumps({"prompt": "a cat"} | {field: "a\0b"}), "application/json")


@pytest.mark.parametrize("field", ["seed", "num_frames", "fps", "priority", "guidance_scale", "seconds", "deadline_s"])
def test_true_is_no_number(field: str) -> None:
    with pytest.raises(ApiError, match=f"{field}: 'True'"):
        read(json.dumps({"prompt": "a cat", field: True}), "application/json")
    assert getattr(read_form((field, "1"))[0], field) in (1, "1")

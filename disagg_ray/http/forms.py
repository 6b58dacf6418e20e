"""Reads bodies of JSON or forms, and describes both."""

from __future__ import annotations

import json
from copy import deepcopy
from email.message import Message as Headers
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from disagg_ray.http.bodies import FILES, LISTS, Upload, place_of, upload_of
from disagg_ray.http.schema import ApiError, explain
from disagg_ray.text import find_repeated, shown

if TYPE_CHECKING:
    from starlette.types import Message

MAX_FILES = 64
"""Of one form; how many a model takes, it says."""
TAIL_BYTES = 1024
"""Of a form, in which its end stands."""
Body = TypeVar("Body", bound=BaseModel)


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the description of a body that is JSON or a form."""
    described = model.model_json_schema(ref_template="{model}")
    described = _inline(described, described.pop("$defs", {}))
    form = deepcopy(described)
    file = {"type": "string", "format": "binary"}
    for field in FILES:
        if field in form["properties"]:
            form["properties"][field] = {"type": "array", "items": file} if field in LISTS else file
    contents = {"application/json": {"schema": described}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": contents}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema with definitions in place of their names: the API's description knows no others."""
    if isinstance(schema, list):
        return [_inline(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if (name := schema.get("$ref")) is not None:
        return definitions[name]
    return {key: _inline(each, definitions) for key, each in schema.items()}


async def read_body(request: Request, model: type[Body]) -> tuple[Body, dict[str, Upload]]:
    """Return a body of JSON or a form, and the files in it by their places in the request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    uploads: dict[str, Upload] = {}
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        given = await _read_form(request, model, uploads)
    elif kind in ("application/json", ""):
        try:
            given = json.loads(await request.body(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "body: it is not JSON; give an object") from error
    else:
        raise ApiError(415, f"Content-Type: {shown(kind)} is none of application/json and multipart/form-data")
    try:
        body = model.model_validate(given)
    except ValidationError as error:
        raise explain(error, model) from error
    for field in FILES:
        if (references := getattr(body, field, None)) is not None:
            for number, reference in enumerate(references if field in LISTS else [references]):
                uploads[place_of(field, number)] = upload_of(field, reference.url)
    return body, uploads


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of these; refuse a name that is there twice, of which one would be left out unseen."""
    if (twice := find_repeated(name for name, _ in pairs)) is not None:
        raise ApiError(400, f"{shown(twice)}: given twice", param=twice[:80])
    return dict(pairs)


async def _read_form(request: Request, model: type[BaseModel], uploads: dict[str, Upload]) -> dict[str, Any]:
    """Return a form's fields; files go into `uploads`."""
    given: dict[str, Any] = {}
    tail = b""

    async def receive() -> Message:
        nonlocal tail
        message = await request.receive()
        tail = (tail + message.get("body", b"")[-TAIL_BYTES:])[-TAIL_BYTES:]
        return message

    watched = Request(request.scope, receive)
    parsed = watched.form(max_files=MAX_FILES, max_fields=64, max_part_size=request.app.state.max_bytes)
    try:
        async with parsed as form:
            _check_end(request.headers["content-type"], tail)
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    await _take_file(name, value, model, given, uploads)
                elif (outer := _outer(name)) in given or FILES.get(outer) in uploads:
                    raise ApiError(400, f"{shown(name)}: given twice", param=name[:80])
                else:
                    given.update(_form_field(name, value))
    except HTTPException as error:
        raise ApiError(400, f"body: {error.detail}") from error
    return given


def _check_end(kind: str, tail: bytes) -> None:
    """Refuse a form of parts whose last bytes lack its end: what was cut off would be left out unseen."""
    header = Headers()
    header["Content-Type"] = kind
    boundary = header.get_boundary()
    if boundary is not None and f"--{boundary}--".encode("latin-1", "replace") not in tail:
        raise ApiError(400, "body: the form ends early; send it whole")


async def _take_file(
    name: str, file: UploadFile, model: type[BaseModel], given: dict[str, Any], uploads: dict[str, Upload]
) -> None:
    """Add a part that is a file; those of a list come one after the other, with or without `[]` after its name."""
    known = [field for field in FILES if field in model.model_fields]
    field = name.removesuffix("[]") if name.removesuffix("[]") in LISTS else name
    if field not in known:
        only = f"; only {', '.join(known)} are" if known else ""
        raise ApiError(400, f"{shown(name)}: is a file{only}", param=name[:80])
    place = place_of(field, sum(place.startswith(f"{FILES[field]}[") for place in uploads))
    if field in given or place in uploads:
        raise ApiError(400, f"{shown(name)}: given twice", param=name[:80])
    uploads[place] = Upload(file.filename or name, await file.read())


def _outer(name: str) -> str:
    """Return the field of a body that a form's field is, or is one of: `mask` of `mask[image_url]`."""
    outer = name.partition("[")[0]
    return outer if outer in FILES else name


def _form_field(name: str, value: str) -> dict[str, Any]:
    """Return a form's field; `input_reference[image_url]` is one of an object, and an empty text leaves a field out."""
    if (outer := _outer(name)) != name:
        return {outer: {name.removeprefix(f"{outer}[").rstrip("]"): value}}
    return {name: value} if value or name == "prompt" else {}

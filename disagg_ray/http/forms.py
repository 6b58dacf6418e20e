"""Reads bodies of JSON or forms, and describes both."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from disagg_ray.http.bodies import IMAGES, Upload, image_of
from disagg_ray.http.schema import ApiError, explain
from disagg_ray.text import shown

Body = TypeVar("Body", bound=BaseModel)


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the description of a body that is JSON or a form."""
    described = model.model_json_schema(ref_template="#/components/schemas/{model}")
    described.pop("$defs", None)
    form = deepcopy(described)
    for field in IMAGES:
        if field in form["properties"]:
            form["properties"][field] = {"type": "string", "format": "binary"}
    contents = {"application/json": {"schema": described}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": contents}}


async def read_body(request: Request, model: type[Body]) -> tuple[Body, dict[str, Upload]]:
    """Return a body of JSON or a form, and the images in it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    uploads: dict[str, Upload] = {}
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        given = await _read_form(request, uploads)
    elif kind in ("application/json", ""):
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "body: it is not JSON; give an object") from error
    else:
        raise ApiError(415, f"Content-Type: {shown(kind)} is none of application/json and multipart/form-data")
    try:
        body = model.model_validate(given)
    except ValidationError as error:
        raise explain(error, model) from error
    for field in IMAGES:
        if (reference := getattr(body, field, None)) is not None:
            uploads[field] = image_of(field, reference.image_url)
    return body, uploads


async def _read_form(request: Request, uploads: dict[str, Upload]) -> dict[str, Any]:
    """Return a form's fields; files go into `uploads`."""
    given: dict[str, Any] = {}
    try:
        form = await request.form(max_files=len(IMAGES), max_fields=64, max_part_size=request.app.state.max_bytes)
    except HTTPException as error:
        raise ApiError(400, f"body: {error.detail}") from error
    for name, value in form.multi_items():
        if name in given or name in uploads:
            raise ApiError(400, f"{shown(name)}: given twice", param=name[:80])
        if not isinstance(value, UploadFile):
            given.update(_form_field(name, value))
        elif name in IMAGES:
            uploads[name] = Upload(value.filename or name, await value.read())
        else:
            raise ApiError(400, f"{shown(name)}: is a file; only {' and '.join(IMAGES)} are", param=name[:80])
    return given


def _form_field(name: str, value: str) -> dict[str, Any]:
    """Return a form's field; `input_reference[image_url]` is one of an object, and an empty text leaves a field out."""
    outer, bracket, inner = name.partition("[")
    if bracket and outer in IMAGES:
        return {outer: {inner.rstrip("]"): value}}
    return {name: value} if value or name == "prompt" else {}

"""OpenAI's images API: a job of a model that makes images, and its image when that is finished."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from disagg_ray.http.bodies import Upload
from disagg_ray.http.follow import follow
from disagg_ray.http.forms import describe_body, read_body
from disagg_ray.http.image_schema import CreateImage, EditImage, Image, Images, refuse_others
from disagg_ray.http.jobs import Jobs
from disagg_ray.http.keys import Key
from disagg_ray.http.routes import ERRORS, Idempotency, WithJobs, WithKey
from disagg_ray.http.schema import ApiError, CreateVideo
from disagg_ray.http.store import Job
from disagg_ray.inputs import REFERENCES
from disagg_ray.models.family import Task

router = APIRouter()
SAME = (
    "prompt", "model", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "priority", "deadline_s",
)  # fmt: skip
"""Fields that a job has too."""
DEFAULT: Literal["png"] = "png"
"""Format of an image whose request names none."""
FORMATS = {"jpeg": "jpg"}
"""Ours, by OpenAI's name where that is another."""
STATUS = {
    "invalid_request": 400, "cancelled": 410, "gone": 410, "deadline_exceeded": 504, "service_lost": 503,
    "storage_failed": 503,
}  # fmt: skip
"""By a failed job's code; of others 500."""
FINAL = {"x-should-retry": "false"}
"""Tells OpenAI's clients not to send a failed job again: it was tried again already where that helps."""


@router.post(
    "/v1/images/generations", response_model=Images, openapi_extra=describe_body(CreateImage), responses=ERRORS
)
async def create_image(request: Request, jobs: WithJobs, key: WithKey, idempotency_key: Idempotency = None) -> Images:
    """Make an image of a text; answer when it is finished."""
    body, _ = await read_body(request, CreateImage)
    return await _make(request, jobs, key, body, {}, idempotency_key)


@router.post("/v1/images/edits", response_model=Images, openapi_extra=describe_body(EditImage), responses=ERRORS)
async def edit_image(request: Request, jobs: WithJobs, key: WithKey, idempotency_key: Idempotency = None) -> Images:
    """Make an image of a text and images; answer when it is finished."""
    body, uploads = await read_body(request, EditImage)
    return await _make(request, jobs, key, body, uploads, idempotency_key)


async def _make(
    request: Request, jobs: Jobs, key: Key, body: CreateImage, files: Mapping[str, Upload], idempotency_key: str | None
) -> Images:
    """Accept a job, wait for its end, and return its image."""
    refuse_others(body)
    accepting = asyncio.ensure_future(run_in_threadpool(_accept, jobs, key, body, files, idempotency_key))
    job = None
    try:
        job = await _finish(request, jobs, key, await asyncio.shield(accepting))
    finally:
        if idempotency_key is None and not (job and job.is_finished):  # nobody is left who could ask for it
            accepting.add_done_callback(partial(_abandon, jobs))
    if job.status != "completed":
        code = job.error_code or ("cancelled" if job.is_finished else "gone")
        message = job.error_message or "the image was cancelled or deleted before it was finished"
        raise ApiError(STATUS.get(code, 500), message, code=code, headers=FINAL)
    return await run_in_threadpool(_answer, request, jobs, job, body)


def _accept(jobs: Jobs, key: Key, body: CreateImage, uploads: Mapping[str, Upload], idempotency_key: str | None) -> Job:
    """Accept a job.

    Raises:
        ApiError: as `Jobs.accept`, with the names of the fields of this API; or the model makes videos.
    """
    model = jobs.runner(body.model).config.model
    if model.traits.makes != "image":
        raise ApiError(400, f"model: it makes videos (model.task {model.task}); POST /v1/videos", param="model")
    size = None if body.size == "auto" else body.size
    made = body.output_format or DEFAULT
    asked = CreateVideo(size=size, format=FORMATS.get(made, made), **{name: getattr(body, name) for name in SAME})
    try:
        return jobs.accept(key, asked, _place(uploads, model.traits), idempotency_key)
    except ApiError as error:
        if error.param not in ("input_reference", REFERENCES):
            raise
        message = error.message.removeprefix("input_reference: ").replace(REFERENCES, "image")
        raise ApiError(error.status, message, param="image", code=error.code) from error


def _place(uploads: Mapping[str, Upload], task: Task) -> dict[str, Upload]:
    """Return images by the places that the model has for them; a mask keeps its own."""
    images = [upload for place, upload in uploads.items() if place.startswith("images[")]
    others = {place: upload for place, upload in uploads.items() if not place.startswith("images[")}
    if REFERENCES in task.takes:
        return others | {f"{REFERENCES}[{number}]": image for number, image in enumerate(images)}
    if len(images) > 1:
        raise ApiError(400, f"image: {len(images)} were sent, and the model takes one; send one", param="image")
    return others | ({"image": images[0]} if images else {})


async def _finish(request: Request, jobs: Jobs, key: Key, job: Job) -> Job:
    """Wait until a job has ended, or its client is gone; return how it is then."""
    async with aclosing(follow(jobs, key, job)) as states:
        async for now in states:
            if now.is_finished or await request.is_disconnected():
                return now
    return job  # deleted


def _abandon(jobs: Jobs, accepting: asyncio.Future[Job]) -> None:
    if not accepting.cancelled() and accepting.exception() is None:
        jobs.upkeep.abandon(accepting.result())


def _answer(request: Request, jobs: Jobs, job: Job, body: CreateImage) -> Images:
    name, size = jobs.content(job, "video")
    image: dict[str, Any] = {"url": f"{request.base_url}v1/videos/{job.id}/content"}
    if body.response_format != "url":
        data = b"".join(jobs.folder.read(name, 0, size))
        image = {"b64_json": base64.b64encode(data).decode()}
    return Images(id=job.id, created=int(job.completed_at or time.time()), data=[Image(**image)], size=job.size,
                  output_format=body.output_format or DEFAULT)  # fmt: skip

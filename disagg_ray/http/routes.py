"""The routes: OpenAI's videos API for jobs of either kind, our own beside it, and what a cluster asks a service."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, StreamingResponse

from disagg_ray.http import schema
from disagg_ray.http.bodies import files_of
from disagg_ray.http.files import MEDIA_TYPES
from disagg_ray.http.follow import follow
from disagg_ray.http.forms import describe_body, read_body
from disagg_ray.http.jobs import Jobs
from disagg_ray.http.keys import Key
from disagg_ray.http.metrics import scrape
from disagg_ray.http.schema import ApiError, CreateVideo, Deleted, RemixVideo, Video, VideoList
from disagg_ray.http.store import Job
from disagg_ray.text import shown

PAGE = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
MAX_IDEMPOTENCY_CHARS = 255
LEAST_POLL_S, MOST_POLL_S = 0.5, 5.0
"""Bounds of the delay that OpenAI's client is told to poll after."""
POLLS = 20
"""Of a job in its predicted seconds."""
BEAT_S = 15.0
"""Between two signs of life on a stream where nothing happens."""
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

router = APIRouter()
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody} for status in (400, 401, 403, 404, 409, 413, 416, 429, 500, 503)
}


async def jobs_of(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


WithJobs = Annotated[Jobs, Depends(jobs_of)]


async def key_of(jobs: WithJobs, authorization: Annotated[str | None, Header(include_in_schema=False)] = None) -> Key:
    return jobs.keys.authenticate(authorization)


WithKey = Annotated[Key, Depends(key_of)]
Idempotency = Annotated[str | None, Header(max_length=MAX_IDEMPOTENCY_CHARS, min_length=1)]


@router.post("/v1/videos", response_model=Video, openapi_extra=describe_body(CreateVideo), responses=ERRORS)
async def create_video(
    request: Request, jobs: WithJobs, key: WithKey, idempotency_key: Idempotency = None
) -> schema.Video:
    """Accept a job, for a video or an image; it is kept once this answers."""
    body, uploads = await read_body(request, CreateVideo)
    return await run_in_threadpool(lambda: jobs.show(jobs.accept(key, body, uploads, idempotency_key)))


@router.get("/v1/videos", response_model=VideoList, responses=ERRORS)
def list_videos(
    jobs: WithJobs, key: WithKey, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:  # fmt: skip
    """List one's jobs, a page after a job's id, be it that of one deleted within a day."""
    last = jobs.store.cursor(after, key.name) if after is not None else None
    if after is not None and last is None:
        raise ApiError(400, f"after: there is no job {shown(after)}", param="after")
    found = jobs.store.page(key.name, last, limit + 1, ascending=order == "asc")
    data = [jobs.show(job) for job in found[:limit]]
    first, end = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first, last_id=end, has_more=len(found) > limit)


@router.get("/v1/videos/{video_id}", response_model=Video, responses=ERRORS)
async def get_video(video_id: str, jobs: WithJobs, key: WithKey) -> Response:
    """Say how a job is."""

    def look() -> Video:
        return jobs.show(jobs.find(key, video_id))

    video = look() if jobs.store.is_quick else await run_in_threadpool(look)
    after_s = max(LEAST_POLL_S, min(MOST_POLL_S, (video.wait_s or 0.0) / POLLS))
    headers = {"openai-poll-after-ms": f"{1000 * after_s:.0f}"}
    return Response(video.model_dump_json(), media_type="application/json", headers=headers)  # checked already


@router.delete("/v1/videos/{video_id}", response_model=Deleted, responses=ERRORS)
def delete_video(video_id: str, jobs: WithJobs, key: WithKey) -> Deleted:
    """Delete a job and its files; one that runs is cancelled."""
    makes = jobs.delete(key, video_id).makes
    return Deleted(id=video_id, object="image.deleted" if makes == "image" else "video.deleted")


@router.post("/v1/videos/{video_id}/cancel", response_model=Video, responses=ERRORS)
def cancel_video(video_id: str, jobs: WithJobs, key: WithKey) -> Video:
    """Cancel a job: the GPU stops within a step."""
    return jobs.show(jobs.cancel(key, video_id))


@router.post(
    "/v1/videos/{video_id}/remix", response_model=Video, openapi_extra=describe_body(RemixVideo), responses=ERRORS
)
async def remix_video(
    video_id: str, request: Request, jobs: WithJobs, key: WithKey, idempotency_key: Idempotency = None
) -> Video:
    """Accept a new prompt with the settings, files and seed of another job."""
    body, _ = await read_body(request, RemixVideo)
    return await run_in_threadpool(lambda: jobs.show(jobs.remix(key, video_id, body.prompt, idempotency_key)))


@router.get("/v1/videos/{video_id}/content", responses=ERRORS, response_class=Response)
def get_content(
    video_id: str, jobs: WithJobs, key: WithKey, variant: Literal["video", "thumbnail"] = "video",
    range: Annotated[str | None, Header()] = None,
) -> Response:  # fmt: skip
    """Return the video or image, or as thumbnail its first frame as WebP; part of it with a Range header."""
    name, size = jobs.content(jobs.find(key, video_id), variant)
    start, stop = _part(range, size)
    headers = {
        "Accept-Ranges": "bytes", "Content-Length": str(stop - start), "ETag": f'"{name}"',
        "Cache-Control": "private, max-age=3600",
        "Content-Disposition": f'inline; filename="{name}"',
    }  # fmt: skip
    if (start, stop) != (0, size):
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    status = 206 if "Content-Range" in headers else 200
    return StreamingResponse(jobs.folder.read(name, start, stop), status, headers, MEDIA_TYPES[name.rpartition(".")[2]])


def _part(header: str | None, size: int) -> tuple[int, int]:
    """Return the bytes that a Range header asks for; the whole for one of several parts or another unit."""
    match = RANGE.fullmatch(header or "")
    if match is None or match[1] == match[2] == "":
        return 0, size
    if match[1] == "":
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    if start >= stop:
        message = f"Range: {shown(header)} is outside the file's {size} bytes"
        raise ApiError(416, message, headers={"Content-Range": f"bytes */{size}"})
    return start, stop


@router.get("/v1/videos/{video_id}/events", responses=ERRORS, response_class=StreamingResponse)
def get_events(video_id: str, jobs: WithJobs, key: WithKey) -> Response:
    """Stream a job as server-sent events: one a denoising step and one a change of its status, until it ends."""
    job = jobs.find(key, video_id)
    return StreamingResponse(_stream(jobs, key, job), headers={"Cache-Control": "no-store"}, media_type=EVENTS)


EVENTS = "text/event-stream"


async def _stream(jobs: Jobs, key: Key, job: Job) -> AsyncIterator[str]:
    sent, told = "", time.monotonic()
    async with aclosing(follow(jobs, key, job)) as states:
        async for now in states:
            video = (await run_in_threadpool(jobs.show, now)).model_dump_json()
            if video != sent:
                sent, told = video, time.monotonic()
                yield f"event: {now.status}\ndata: {video}\n\n"
            elif time.monotonic() > told + BEAT_S:
                told = time.monotonic()
                yield ": waiting\n\n"


@router.get("/v1/models", response_model=schema.ModelList, responses=ERRORS)
def list_models(jobs: WithJobs, key: WithKey) -> schema.ModelList:  # noqa: ARG001 - one must have one
    """List the services, with their defaults and limits."""
    data = []
    for name, runner in jobs.runners.items():
        created = int(runner.link.snapshot.began) if runner.link.snapshot is not None else 0
        model, defaults, limits = runner.config.model, vars(runner.config.defaults), vars(runner.config.limits)
        data.append(
            schema.Model(
                id=name,
                created=created,
                task=model.task,
                makes=model.traits.makes,
                multiple=model.traits.multiple,
                files=files_of(model),
                defaults=defaults,
                limits=limits,
            )
        )
    return schema.ModelList(data=data)


@router.get("/v1/models/{model}", response_model=schema.Model, responses=ERRORS)
def get_model(model: str, jobs: WithJobs, key: WithKey) -> schema.Model:
    """Describe a service."""
    jobs.runner(model)
    return next(each for each in list_models(jobs, key).data if each.id == model)


@router.get("/health", tags=["cluster"])
def health() -> dict[str, str]:
    """Say that this process lives."""
    return {"status": "ok"}


@router.get("/ready", tags=["cluster"], responses=ERRORS)
def ready(jobs: WithJobs) -> dict[str, Any]:
    """Say whether the database answers and every stage of every model has a replica."""
    jobs.store.check()
    models = {name: runner.link.is_ready for name, runner in jobs.runners.items()}
    if not all(models.values()):
        waiting = ", ".join(name for name, is_ready in models.items() if not is_ready)
        raise ApiError(503, f"not ready: {waiting}", code="not_ready", headers={"Retry-After": "5"})
    return {"status": "ready", "models": models}


@router.get("/metrics", tags=["cluster"], response_class=PlainTextResponse, responses=ERRORS)
def metrics() -> str:
    """Return this node's metrics of disagg_ray in Prometheus' text form."""
    try:
        return scrape()
    except OSError as error:
        raise ApiError(503, f"Ray's metrics agent does not answer: {error}") from error


@router.get("/", include_in_schema=False)
def page() -> Response:
    return asset("index.html")


@router.get("/page/{name}", include_in_schema=False)
def asset(name: str) -> Response:
    if name not in PAGE:
        raise ApiError(404, f"there is no page {shown(name)}")
    content = files("disagg_ray.http").joinpath("page", name).read_bytes()
    return Response(content, media_type=PAGE[name], headers={"Cache-Control": "no-cache"})

"""What a key may ask for, and how much may wait; a refusal says when to try again."""

from __future__ import annotations

import math

from disagg_ray.http.keys import Key
from disagg_ray.http.schema import ApiError
from disagg_ray.http.store import Accepting, Job

UNKNOWN_RETRY_S = 10
"""Until one job has finished, which tells how long one takes."""
MAX_RETRY_S = 3600


def check_limits(accepting: Accepting, key: Key, job: Job, max_queued: int, seconds_each: float | None) -> None:
    """Refuse a job when its model's queue, or what its key may have, is full.

    `seconds_each` are predicted between two jobs of the model that end; None: nothing is known.

    Raises:
        ApiError: names the limit.
    """
    if accepting.count(job.model) >= max_queued:
        raise _overloaded(f"{job.model}: {max_queued} jobs are unfinished", "queue_full", seconds_each)
    if key.max_in_flight is not None and accepting.in_flight() >= key.max_in_flight:
        message = f"{key.max_in_flight} jobs of this key are unfinished"
        raise _overloaded(message, "too_many_in_flight", seconds_each)
    if job.makes == "video" and key.seconds_a_day is not None:
        _check_day(accepting.seconds_today() + job.length_s, key.seconds_a_day, "seconds of video")
    if job.makes == "image" and key.images_a_day is not None:
        _check_day(accepting.images_today() + 1, key.images_a_day, "images")


def _overloaded(message: str, code: str, seconds: float | None) -> ApiError:
    retry = min(MAX_RETRY_S, max(1, math.ceil(seconds if seconds is not None else UNKNOWN_RETRY_S)))
    return ApiError(429, f"{message}; try again in {retry} s", code=code, headers={"Retry-After": str(retry)})


def _check_day(used: float, limit: float, what: str) -> None:
    if used > limit:
        message = f"{limit:g} {what} a day are this key's limit; ask for less, or tomorrow"
        raise ApiError(429, message, code="daily_limit", headers={"Retry-After": str(MAX_RETRY_S)})

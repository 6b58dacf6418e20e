"""The video of a request, fetched from the replica of the last stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from disagg_ray.driver.context import RunContext
from disagg_ray.driver.outputs import Output
from disagg_ray.media.video import Frames
from disagg_ray.replica.messages import Encoded
from disagg_ray.replica.sizing import frames_in_piece
from disagg_ray.replica.stage import RAW
from disagg_ray.request import ResolvedRequest


@dataclass(frozen=True)
class Video:
    """Either the encoded file or the raw frames."""

    data: bytes | None = None
    frames: Frames | None = None
    encode_s: float | None = None
    """Seconds that encoding the file took; None for raw frames."""


async def fetch_video(context: RunContext, request: ResolvedRequest, output: Output) -> Video:
    """Have the replica encode the file and return it, or pull the raw frames piece by piece.

    Raises:
        DisaggError: what failed it.
    """
    actor, reply = output.holder, output.reply
    assert actor is not None and reply is not None, "the driver's pool never holds the last stage's output"
    if request.format not in RAW:
        encoded: Encoded = await context.fleet.ask(actor, "encode", output.key, request.fps, request.format)
        return Video(data=encoded.data, encode_s=encoded.seconds)
    frames = np.empty((reply.num_frames, request.height, request.width, 3), np.float32)
    for start in range(0, reply.num_frames, frames_in_piece(request.height * request.width, reply.num_frames)):
        piece = await context.fleet.ask(actor, "piece", output.key, start)
        await context.driver_pool.pull_frames(piece, frames[start:])
    return Video(frames=frames)

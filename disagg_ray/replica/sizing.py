"""How large pools are, a replica's and the driver's: from what the largest requests within the limits take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_ray.config.schema import REPLICA_WINDOW, Config, LimitsConfig
from disagg_ray.errors import ConfigError
from disagg_ray.graph import FRAMES, Graph
from disagg_ray.models.geometry import Geometry
from disagg_ray.transfer.slots import slot_bytes

MAX_VIDEOS = 2
"""Decoded and not yet fetched at a replica: one whose file is being encoded and one that waits for that."""

UNEVEN = 2
"""Pool over-provisioning: capacity as a multiple of the replica's even share of what is in flight."""

if TYPE_CHECKING:
    from disagg_ray.replica.messages import ReplicaInfo
    from disagg_ray.replica.stage import Stage


def slots_bytes(inputs: int, outputs: int, in_flight: int, replicas: int, *, last: bool) -> int:
    """Return what the slots of each of a stage's replicas take: a request's inputs and outputs are given in bytes."""
    return REPLICA_WINDOW * inputs + num_rooms(in_flight, replicas, last=last) * outputs


def num_rooms(in_flight: int, replicas: int, *, last: bool) -> int:
    """Return for how many requests' outputs each of a stage's replicas needs room.

    An output stays where it was made until what is made of it is safe, so all requests in flight may have one in a
    stage. The scheduler fills replicas by predicted seconds, not by room: one may do twice its share for as long as
    half of the stage is being replaced, or always if it is twice as fast as the mean. Past that it waits for room, and
    work goes to the others, which together have more than all that is in flight. Of the `last` stage, outputs are raw
    frames, which a replica makes no more of until some are fetched.
    """
    own = MAX_VIDEOS if last else UNEVEN * -(-in_flight // replicas)
    return min(in_flight, own + REPLICA_WINDOW)


def enough_for(rooms: int, replicas: int) -> int:
    """Return how many requests in flight need no more than these rooms at each replica, by `num_rooms`."""
    return max(rooms, replicas * ((rooms - REPLICA_WINDOW) // UNEVEN))


def most_in_flight(config: Config, graph: Graph, replicas: Sequence[ReplicaInfo]) -> int:
    """Return how many requests may be in flight with these replicas, some of which may have been started for fewer.

    As many as replicas are asked to compute and prefetch. Where several stages feed one, though, no more than their
    pools have room for: requests that have one's output would wait for those that have its sibling's, and they for
    these.
    """
    most = sum(REPLICA_WINDOW * stage.num_replicas for stage in config.stages.values())
    for stage in filter(graph.has_sibling, config.stages):
        rooms = [replica.num_rooms for replica in replicas if replica.stage == stage]
        if rooms:
            most = min(most, enough_for(min(rooms), len(rooms)))
    return most


def pool_bytes(config: Config, stage: Stage) -> int:
    """Return the memory that a replica of a stage registers.

    Raises:
        ConfigError: `transport.pool_bytes` is too small for the largest request within `limits`.
    """
    needs, asked = stage.needs(), config.transport.pool_bytes
    replicas, last = config.stages[stage.name].least_replicas, FRAMES in stage.ports.outputs
    slots = slots_bytes(needs.input_bytes, needs.output_bytes, config.max_in_flight, replicas, last=last)
    if asked == "auto":
        return slots + stage.cache_bytes
    # with less, requests that have one stage's output would wait for those that have its sibling's, and they for these
    least = slots if stage.has_sibling else REPLICA_WINDOW * needs.minimum
    if int(asked) < least:
        num_outputs = needs.num_outputs(least)
        raise ConfigError(
            f"transport.pool_bytes: {asked} is too small: {REPLICA_WINDOW} inputs and {num_outputs} outputs of the "
            f"largest requests within limits take {least} bytes of a {stage.name}'s pool (each {needs.input_bytes} in, "
            f"{needs.output_bytes} out); write at least that, or auto"
        )
    return int(asked)


PIECE_BYTES = 16 * 2**20
"""Raw frames are sent in pieces of about this size, at least one frame."""


@dataclass(frozen=True)
class PoolNeeds:
    """Bytes of a pool that one request of the largest admitted size takes."""

    input_bytes: int
    output_bytes: int

    @property
    def minimum(self) -> int:
        return self.input_bytes + self.output_bytes

    def num_outputs(self, nbytes: int) -> int:
        """Return how many requests' outputs fit a pool beside the inputs of those that are computed and prefetched."""
        return (nbytes - REPLICA_WINDOW * self.input_bytes) // self.output_bytes


def frame_bytes(pixels: int) -> int:
    """Return the bytes of one float32 RGB frame."""
    return 3 * 4 * pixels


def frames_in_piece(pixels: int, num_frames: int) -> int:
    """Return how many frames are sent at once when raw frames are asked for."""
    return min(num_frames, max(1, PIECE_BYTES // frame_bytes(pixels)))


def most_piece_bytes(limits: LimitsConfig) -> int:
    """Return the most bytes that a piece of raw frames takes, whatever is asked for within limits."""
    frame = frame_bytes(limits.max_pixels)
    return min(limits.max_frames * frame, max(PIECE_BYTES, frame))


def driver_pool_bytes(config: Config, graph: Graph, geometry: Geometry) -> int:
    """Return the host memory the driver needs: each admitted request's images, latents held, pieces of raw frames.

    Latents wait in their producer's pool while there is no room here.

    Raises:
        ConfigError: `transport.driver_pool_bytes` is too small.
    """
    limits = config.limits
    sizes = geometry.tensor_bytes(limits.max_pixels, limits.max_frames, limits.max_image_pixels)
    images = sum(slot_bytes(sizes[name]) for name in {name for _, names in graph.images for name in names})
    after = graph.order[graph.order.index(graph.kept) :] if graph.kept is not None else ()
    held = sum(slot_bytes(sizes[name]) for name in graph.outputs(after[0])) if after else 0
    pieces = REPLICA_WINDOW * slot_bytes(most_piece_bytes(limits))
    asked, minimum = config.transport.driver_pool_bytes, images + held + pieces
    if asked == "auto":
        num_held = REPLICA_WINDOW * sum(config.stages[stage].most_replicas for stage in after)
        return config.max_in_flight * images + num_held * held + pieces
    if int(asked) < minimum:
        raise ConfigError(f"transport.driver_pool_bytes: {asked} is too small: one request may take {minimum} bytes")
    return int(asked)

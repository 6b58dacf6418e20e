"""The stage graph: which stage feeds which, inferred from the inputs and outputs of their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from disagg_ray.errors import GraphError

CONTROLS = frozenset({"video", "mask", "reference_images"})
IMAGES = frozenset({"image", "last_image"}) | CONTROLS
"""Tensors of a request itself: the driver publishes them as uint8, an image as (height, width, 3)."""

REQUEST_FIELDS = IMAGES | {
    "prompt", "negative_prompt", "max_sequence_length", "height", "width", "num_frames", "num_inference_steps",
    "generator", "output_type", "num_reference_images", "conditioning_scale", "sigmas", "request",
}  # fmt: skip
"""Block inputs that a request supplies."""

LATENTS = "latents"
"""Finished latents: the driver keeps a copy, so that a replica lost later does not cost the denoise."""

FRAMES = "videos"
"""The output that makes a stage the last one: frames, float32 (num_frames, height, width, 3) in [0, 1]."""

SOUND = "audio"
"""Sound that goes with the frames, of the same stage: `media.sound.Sound`."""


@dataclass(frozen=True)
class StagePorts:
    """What a stage's blocks read and write, by diffusers' names."""

    stage: str
    required: frozenset[str]
    """Required inputs."""
    optional: frozenset[str]
    """Inputs with a default."""
    outputs: frozenset[str]

    @property
    def inputs(self) -> frozenset[str]:
        return self.required | self.optional


@dataclass(frozen=True)
class Edge:
    producer: str
    consumer: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    order: tuple[str, ...]
    """Stage names, producers before consumers."""
    edges: tuple[Edge, ...]
    images: tuple[tuple[str, tuple[str, ...]], ...]
    """(stage, names) of the request's images that each stage reads."""
    last: str
    """The stage that makes the frames."""

    def producers(self, stage: str) -> tuple[str, ...]:
        return tuple(edge.producer for edge in self.edges if edge.consumer == stage)

    def consumers(self, stage: str) -> tuple[str, ...]:
        return tuple(edge.consumer for edge in self.edges if edge.producer == stage)

    def has_sibling(self, stage: str) -> bool:
        """Return whether another stage's outputs are needed too before a stage's own are of use."""
        return any(len(self.producers(consumer)) > 1 for consumer in self.consumers(stage))

    def upstream(self, stage: str) -> tuple[str, ...]:
        """Return a stage and all stages whose outputs it depends on, in order."""
        found = {stage}
        for other in reversed(self.order):
            if found & set(self.consumers(other)):
                found.add(other)
        return tuple(other for other in self.order if other in found)

    def inputs(self, stage: str) -> tuple[str, ...]:
        """Return the tensors a stage pulls from other stages."""
        return tuple(name for edge in self.edges if edge.consumer == stage for name in edge.tensors)

    def outputs(self, stage: str) -> tuple[str, ...]:
        """Return the tensors a stage publishes: those that some other stage reads."""
        return tuple(sorted({name for edge in self.edges if edge.producer == stage for name in edge.tensors}))

    @property
    def kept(self) -> str | None:
        """The stage whose latents the driver keeps until the video is done; None if no stage publishes latents."""
        return next((edge.producer for edge in self.edges if LATENTS in edge.tensors), None)

    def image_inputs(self, stage: str) -> tuple[str, ...]:
        return dict(self.images).get(stage, ())


def build_graph(ports: Sequence[StagePorts]) -> Graph:
    """Infer the edges of a set of stages.

    Raises:
        GraphError: a required input without a producer, two producers of one tensor, a cycle, no or two last stages.
    """
    producer_of = _producers(ports)
    edges = []
    for port in ports:
        feeds: dict[str, list[str]] = {}
        for name in sorted(port.inputs - REQUEST_FIELDS - port.outputs):
            if name in producer_of:
                feeds.setdefault(producer_of[name], []).append(name)
            elif name in port.required:
                raise GraphError(
                    f"stages.{port.stage}.blocks: {name!r} has no producer: add the block that makes it to a stage"
                )
        edges += [Edge(producer, port.stage, tuple(names)) for producer, names in feeds.items()]
    order = _sort(ports, edges)
    last = [port.stage for port in ports if FRAMES in port.outputs]
    if len(last) != 1:
        raise GraphError(f"stages: exactly one must hold the block 'decode', which makes the frames; found {last}")
    images = tuple((port.stage, names) for port in ports if (names := tuple(sorted(port.inputs & IMAGES))))
    return Graph(order, tuple(sorted(edges, key=lambda e: (order.index(e.consumer), e.producer))), images, last[0])


def _producers(ports: Sequence[StagePorts]) -> dict[str, str]:
    read = frozenset().union(*(port.inputs for port in ports))
    producer_of: dict[str, str] = {}
    for port in ports:
        for name in sorted(port.outputs & read - REQUEST_FIELDS):
            others = [p.stage for p in ports if name in p.inputs - p.outputs and p.stage != port.stage]
            if name in producer_of and others:
                raise GraphError(f"stages: both {producer_of[name]} and {port.stage} make {name!r}; keep one of them")
            producer_of.setdefault(name, port.stage)
    return producer_of


def _sort(ports: Sequence[StagePorts], edges: Sequence[Edge]) -> tuple[str, ...]:
    needs = {port.stage: {edge.producer for edge in edges if edge.consumer == port.stage} for port in ports}
    try:
        return tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise GraphError(f"stages: cycle in the stage graph: {cycle}; move a block to another stage") from error

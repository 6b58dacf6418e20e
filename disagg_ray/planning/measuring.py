"""Times a loaded stage with one request after the other, alone or as one rank of several."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from disagg_ray.graph import Graph
from disagg_ray.media.video import encode
from disagg_ray.planning.profile import Load, Point, StageProfile
from disagg_ray.replica.stage import RAW, Stage
from disagg_ray.request import ResolvedRequest
from disagg_ray.text import human_size

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks

logger = logging.getLogger("disagg_ray")


@dataclass(frozen=True)
class Case:
    """One request, with its images and the tensors that the stages so far made, in host memory."""

    request: ResolvedRequest
    tensors: dict[str, torch.Tensor]

    @property
    def load(self) -> Load:
        request = self.request
        return Load(request.height, request.width, request.num_frames, request.num_passes)

    def of_stage(self, stage: str, graph: Graph) -> Case:
        """Return the case with the inputs of one stage alone."""
        names = graph.image_inputs(stage) + graph.inputs(stage)
        return Case(self.request, {name: self.tensors[name] for name in names if name in self.tensors})


def measure_stage(
    stage: Stage, graph: Graph, cases: Sequence[Case], repeats: int, ranks: Ranks | None = None
) -> StageProfile:
    """Load a stage and time it with every case; its outputs are added to the cases' tensors.

    With `ranks`, each of them does the same at once, and the seconds are this one's.
    """
    stage.connect(graph)
    began = time.perf_counter()
    stage.load(ranks)
    load_s = time.perf_counter() - began
    logger.info("profile: %s loaded in %.1f s", stage.name, load_s)
    points = []
    for case in cases:
        torch.cuda.empty_cache()  # of larger cases before
        own = case.of_stage(stage.name, graph)
        outputs = stage.compute(own.request, own.tensors, None)  # not measured: chooses kernels, and allocates
        points += [_measure_point(stage, own) for _ in range(repeats)]
        case.tensors.update({name: tensor.cpu() for name, tensor in outputs.tensors.items()})
        size = human_size(case.load.width, case.load.height, case.load.num_frames)
        about = stage.name, size, case.load.passes, points[-1].compute_s
        logger.info("profile: %s computed %s, %d passes, in %.3f s", *about)
    needs, settings = stage.needs(), stage.config.stages[stage.name]
    denoises = "denoise" in settings.blocks
    model = stage.component("transformer").config if denoises else None
    num_heads, num_blocks = (model.num_attention_heads, model.num_layers) if model is not None else (0, 0)
    profile = StageProfile(
        stage.name, denoises, load_s, sum(stage.weights.values()), needs.input_bytes, needs.output_bytes,
        stage.cache_bytes, tuple(points), num_heads, num_blocks, settings.parallel,
    )  # fmt: skip
    del stage
    gc.collect()
    torch.cuda.empty_cache()
    return profile


def _measure_point(stage: Stage, case: Case) -> Point:
    before = stage.allocated_bytes
    if before:
        torch.cuda.reset_peak_memory_stats()
    turns_before, began = stage.turns_s, time.perf_counter()
    outputs = stage.compute(case.request, case.tensors, None)
    computed, turns_after = time.perf_counter(), stage.turns_s
    turn_s = computed - began if turns_before is None or turns_after is None else turns_after - turns_before
    if (clip := outputs.clip) is not None and clip.frames.size and case.request.format not in RAW:  # rank 0 has all
        encode(clip.frames, case.request.fps, case.request.format, stage.config.output.scale, sound=clip.sound)
    finished = time.perf_counter()
    handoff = sum(tensor.nbytes for tensor in outputs.tensors.values())
    work = max(0, stage.peak_bytes - before)
    return Point(case.load, computed - began, turn_s, finished - computed, work, handoff)

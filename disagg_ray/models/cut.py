"""Some top-level blocks of a checkpoint's diffusers modular pipeline, run as one stage."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.modular_pipelines import PipelineState, SequentialPipelineBlocks

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.stages import StageConfig
from disagg_ray.errors import GraphError
from disagg_ray.graph import StagePorts
from disagg_ray.models.absent import stand_in
from disagg_ray.models.blocks import EmbeddingCache, Guidance, KeepsTexts, OnStep
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.gpu_lock import GpuLock
from disagg_ray.models.model import Model
from disagg_ray.models.stage_components import StageComponents
from disagg_ray.models.tuning import renew_step_cache
from disagg_ray.request import ResolvedRequest
from disagg_ray.text import did_you_mean

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks

logger = logging.getLogger("disagg_ray")

IDLE = "stages.%s: a request without guidance leaves half of the ranks idle (parallel.cfg=2)"


class Cut:
    """Part of a model: the blocks of one stage and the components they need, nothing else.

    Source: `diffusers.ModularPipeline`, with the family's blocks (`models.model.Model`).
    """

    def __init__(self, checkpoint: Checkpoint, stage: str, blocks: Sequence[str], num_parts: int = 0) -> None:
        """Take names of blocks; `num_parts` of them, of this and other stages, share the tiles of a decode."""
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self._checkpoint = checkpoint
        self._stage = stage
        self._ranks: Ranks | None = None
        self._told_idle = False
        self._model: Model = checkpoint.family.part("model").MODEL
        known, self._stepper = self._model.blocks(checkpoint)
        parts = self._model.part_blocks(blocks, num_parts, checkpoint.folder)
        leaves = _choose(known, stage, blocks, parts)
        self._kinds = {param.name: param.kwargs_type for b in known.values() for param in b.intermediate_outputs}
        """What diffusers files a tensor under, by its name, whichever stage made it."""
        self._text_encoders = [block for block in leaves.values() if isinstance(block, KeepsTexts)]
        self.ports = _ports(stage, leaves)
        self._blocks = SequentialPipelineBlocks.from_blocks_dict(leaves)
        self._pipeline = self._blocks.init_pipeline()  # of no folder: its indexes could name other folders and classes
        for block in leaves.values():  # the pipeline only has copies: ours run, and call our `on_step`
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(disable=True)
        if checkpoint.geometry.boundary_ratio is not None:
            self._pipeline.register_to_config(boundary_ratio=checkpoint.geometry.boundary_ratio)
        stand_in(self._pipeline, checkpoint, self._model.constants(checkpoint.geometry))
        self._held = StageComponents(checkpoint, stage, self._model, self.components)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are loaded from the checkpoint."""
        names = self._pipeline.component_names
        return tuple(n for n in names if self._pipeline.get_component_spec(n).default_creation_method != "from_config")

    @property
    def encodes_text(self) -> bool:
        return bool(self._text_encoders)

    def use_cache(self, cache: EmbeddingCache) -> None:
        """Look texts up, before encoding them, in a cache that serves this cut alone."""
        for block in self._text_encoders:
            block.cache = cache

    def load(
        self,
        dtypes: Mapping[str, str],
        device: str,
        options: StageConfig,
        sizes: Sequence[Sequence[int]],
        ranks: Ranks | None = None,
    ) -> dict[str, int]:
        """Load the components (`StageComponents.load`), and return the bytes of their weights by name."""
        self._options, self._ranks = options, ranks
        loaded, weights = self._held.load(dtypes, device, options, sizes, ranks)
        self._pipeline.register_components(**loaded)
        return weights

    def weight_bytes(self, dtypes: Mapping[str, str], parallel: ParallelConfig) -> int | None:
        """Return about what `load` would, in all, without loading; None: the weights are not on this machine yet."""
        return self._held.weight_bytes(dtypes, parallel)

    def take_turns(self, turns: GpuLock) -> None:
        """Have every call of a model take a turn on the GPU, which ends when its stream is done."""
        for name in self.components:
            if isinstance(model := self.component(name), torch.nn.Module):
                turns.apply(model, lambda: torch.cuda.current_stream().synchronize())

    def component(self, name: str) -> Any:
        """Return a loaded component."""
        return getattr(self._pipeline, name)

    def run(
        self, request: ResolvedRequest, tensors: Mapping[str, Any], on_step: OnStep | None = None
    ) -> dict[str, Any]:
        """Run the blocks for one request and return their outputs by name.

        `tensors` are the outputs of other stages, on this stage's device, and the request's images as PIL images.
        """
        self._prepare(request)
        state = PipelineState()
        for name, value in (_request_inputs(request, self._checkpoint) | dict(tensors)).items():
            state.set(name, value, self._kinds.get(name))
        self._stepper.on_step = on_step
        _, state = self._blocks(self._pipeline, state)
        for hook in self._held.offloaded:
            hook.offload()
        return {name: value for name in self.ports.outputs if (value := state.get(name)) is not None}

    def _prepare(self, request: ResolvedRequest) -> None:
        """Give this request its own scheduler, guidance and step caches, which carry state from step to step."""
        scales = {"guider": request.guidance_scale, "guider_2": request.guidance_scale_2}
        own: dict[str, Any] = {
            name: Guidance(
                guidance_scale=scale if scale is not None else request.guidance_scale, enabled=request.guided
            )
            for name, scale in scales.items()
            if name in self._pipeline.component_names
        }
        if "scheduler" in self.components:
            scheduler = copy.deepcopy(self._pipeline.scheduler)
            for guidance in own.values():
                guidance.scheduler, guidance.ranks = scheduler, self._ranks
            own["scheduler"] = scheduler
        self._pipeline.register_components(**own)
        if self._ranks is not None and self._ranks.parallel.cfg > 1 and own and not request.guided:
            logger.log(logging.DEBUG if self._told_idle else logging.INFO, IDLE, self._stage)
            self._told_idle = True
        cache, tile = self._options.denoiser.step_cache, self._options.vae.tile_pixels
        for name in self._held.transformers if cache.method != "none" else ():
            renew_step_cache(self.component(name), cache, request.num_inference_steps)
        if "vae" in self.components:
            self._pipeline.vae.use_tiling = tile is not None and request.height * request.width >= tile


def _choose(leaves: Mapping[str, Any], stage: str, names: Sequence[str], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's leaf blocks in the model's order, named `block` or `block.part`."""
    known = list(dict.fromkeys(name.split(".")[0] for name in leaves))
    for name in names:
        if name not in (*known, *parts):
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise GraphError(f"stages.{stage}.blocks: this model has no block {name!r}{hint}")
    return {name: block for name, block in leaves.items() if name.split(".")[0] in names} | dict(parts)


def _ports(stage: str, leaves: Mapping[str, Any]) -> StagePorts:
    required: dict[str, bool] = {}  # the first block that reads an input says whether it must be there
    outputs: set[str] = set()
    for block in leaves.values():
        for param in block.inputs:
            if param.name and param.name not in outputs:
                required.setdefault(param.name, param.required)
        outputs |= {param.name for param in block.intermediate_outputs}
    needed = frozenset(name for name, must in required.items() if must)
    return StagePorts(stage, needed, frozenset(required) - needed, frozenset(outputs))


def _request_inputs(request: ResolvedRequest, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "max_sequence_length": checkpoint.geometry.max_sequence_length,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "sigmas": np.array(checkpoint.model.sigmas) if checkpoint.model.sigmas else None,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
        "num_reference_images": request.num_references,
        "conditioning_scale": request.conditioning_scale,
        "request": request,
    }

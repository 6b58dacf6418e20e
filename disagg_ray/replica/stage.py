"""A stage without Ray and without memory management: tensors in, tensors out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from disagg_ray.config.schema import Config
from disagg_ray.errors import ConfigError, RequestError
from disagg_ray.graph import FRAMES, IMAGES, SOUND, Graph, StagePorts
from disagg_ray.inputs import unpack
from disagg_ray.media.video import Clip, Frames
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.gpu_lock import GpuLock
from disagg_ray.models.preflight import check_fit
from disagg_ray.models.warm_up import example_request, example_tensors
from disagg_ray.replica.messages import RankMemory
from disagg_ray.replica.sizing import PoolNeeds, frame_bytes, frames_in_piece, most_piece_bytes
from disagg_ray.request import ResolvedRequest
from disagg_ray.transfer.slots import slot_bytes

if TYPE_CHECKING:
    from disagg_ray.models.blocks import EmbeddingCache, OnStep
    from disagg_ray.models.parallel.ranks import Ranks


RAW = ("frames", "npy")
"""Formats for which the frames themselves are sent to the driver."""


@dataclass(frozen=True)
class Outputs:
    """What a stage made of one request."""

    tensors: dict[str, torch.Tensor]
    """Tensors that other stages read."""
    clip: Clip | None = None
    """Of the last stage."""

    @property
    def frames(self) -> Frames | None:
        return None if self.clip is None else self.clip.frames

    def checked(self, stage: str) -> Outputs:
        """Return these outputs if their numbers are some of which a video can be made.

        Raises:
            RequestError: names what holds them: the same would come of another attempt.
        """
        found = {name: bool(tensor.isfinite().all()) for name, tensor in self.tensors.items()}
        if self.clip is not None:
            found["frames"] = all(np.isfinite(frame.sum()) for frame in self.clip.frames)
            found["sound"] = self.clip.sound is None or bool(np.isfinite(self.clip.sound.samples.sum()))
        for name, are_finite in found.items():
            if not are_finite:
                raise RequestError(
                    f"{stage}: its {name} hold numbers that are not finite; lower the request's scales of guidance, or "
                    f"use a larger precision (model.dtype, stages.*.dtype, stages.*.vae.dtype)"
                )
        return self


class Stage:
    """The blocks of one stage and their weights: encoder, transformer, decoder, or any other cut of the model."""

    def __init__(self, name: str, config: Config) -> None:
        from disagg_ray.models.cut import Cut  # seconds of imports that the driver does without

        self.name = name
        self.config = config
        self._settings = config.stages[name]
        self._checkpoint = open_checkpoint(config.model)
        self.geometry = self._checkpoint.geometry
        check_fit(config, self.geometry)
        self._cut = Cut(self._checkpoint, name, self._settings.blocks, config.num_parts)
        self.weights: dict[str, int] = {}
        """Bytes of each loaded component."""
        self._stream: torch.cuda.Stream | None = None
        self._turns: GpuLock | None = None
        self._short = False
        """Of GPU memory, at least once."""

    @property
    def ports(self) -> StagePorts:
        return self._cut.ports

    @property
    def folder(self) -> Path:
        """The model's, on this machine."""
        return self._checkpoint.folder

    @property
    def peak_bytes(self) -> int:
        """Most GPU memory that torch ever held for this process, what lay free in it included; 0 on a CPU.

        No other process on that GPU could have had it.
        """
        return torch.cuda.max_memory_reserved() if self.device == "cuda" else 0

    @property
    def allocated_bytes(self) -> int:
        """GPU memory that tensors of this process take now; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def memory(self) -> tuple[RankMemory, ...]:
        """Return the GPU memory of this process, as of the only rank."""
        return (RankMemory(self.allocated_bytes, self.peak_bytes),)

    @property
    def device(self) -> str:
        return self._settings.torch_device

    @property
    def lock_wait_until(self) -> float:
        """Monotonic time until which it waited for its turn on the GPU, and so could not make progress."""
        if self._turns is None:
            return 0.0
        return time.monotonic() if self._turns.waiting else self._turns.began

    @property
    def turns_s(self) -> float | None:
        """Seconds of all turns that it had on a GPU it shares; None: it takes none."""
        return None if self._turns is None else self._turns.held_s

    @property
    def cache_bytes(self) -> int:
        """Most bytes of prompt embeddings to keep; 0 where no text is encoded."""
        return self._settings.cache_bytes if self._cut.encodes_text else 0

    def use_cache(self, cache: EmbeddingCache) -> None:
        """Look texts up, before encoding them, in a cache that serves this stage alone."""
        self._cut.use_cache(cache)

    def connect(self, graph: Graph) -> None:
        """Learn which tensors come from other stages and which go to them.

        Raises:
            ConfigError: the stage has no GPU to run on; a pool there would fail with other words.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"stages.{self.name}.device: cuda is not available to this process; write cpu, give the "
                f"stage num_gpus, or see whether CUDA_VISIBLE_DEVICES hides the GPU"
            )
        most = self._settings.max_vram_bytes
        if self.device == "cuda" and most is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, most / total))
        self._inputs = graph.inputs(self.name) + graph.image_inputs(self.name)
        self._outputs = graph.outputs(self.name)
        self.has_sibling = graph.has_sibling(self.name)

    def load(self, ranks: Ranks | None = None) -> None:
        """Load the weights of this stage's components and nothing else, and run the sizes of its warm-up once.

        With `ranks`, each of them loads, and computes the same requests in the same order.
        """
        defaults = self.config.defaults
        sizes = self._settings.warm_up or [[defaults.height, defaults.width, defaults.num_frames]]
        self.weights = self._cut.load(self._dtypes(), self.device, self._settings, sizes, ranks)
        if self.device == "cuda":  # a stream of its own: Mooncake's reads of GPU memory wait for the default one
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            if self.config.takes_turns(self.name):
                self._turns = GpuLock(str(torch.cuda.get_device_properties(0).uuid))
                self._cut.take_turns(self._turns)
        for size in self._settings.warm_up:
            tensors = example_tensors(self._checkpoint, self._inputs, size)
            self.compute(example_request(self._checkpoint, size), tensors, None)

    def component(self, name: str) -> Any:
        """Return a loaded model, to measure or to look at."""
        return self._cut.component(name)

    def weight_bytes(self) -> int | None:
        """Return what the weights will take, measured without loading them; None: they are not on this machine yet."""
        return self._cut.weight_bytes(self._dtypes(), self._settings.parallel)

    def _dtypes(self) -> dict[str, str]:
        return {component: self.config.dtype_of(self.name, component) for component in self._cut.components}

    def output_bytes(self, request: ResolvedRequest) -> dict[str, int]:
        """Return the most that each output of a request can take, by name; frames are sent in pieces of one slot."""
        pixels = request.height * request.width
        return self._sizes(self._outputs, pixels, request.num_frames, request.image_pixels, request.format in RAW)

    def needs(self) -> PoolNeeds:
        """Return what the largest request within `limits` takes of this stage's pool."""
        limits = self.config.limits
        most = (limits.max_pixels, limits.max_frames, limits.max_image_pixels)
        inputs = self._sizes(self._inputs, *most, raw=False)
        outputs = self._sizes(self._outputs, *most, raw=False)
        if FRAMES in self.ports.outputs:
            outputs[FRAMES] = most_piece_bytes(limits)
        return PoolNeeds(sum(map(slot_bytes, inputs.values())), sum(map(slot_bytes, outputs.values())))

    def _sizes(
        self, names: Iterable[str], pixels: int, num_frames: int, image_pixels: int, raw: bool
    ) -> dict[str, int]:
        known = self.geometry.tensor_bytes(pixels, num_frames, image_pixels, self.config.num_parts)
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ConfigError(f"stages.{self.name}.blocks: the size of {unknown[0]!r} between stages is not known")
        sizes = {name: known[name] for name in names}
        if raw and FRAMES in self.ports.outputs:
            sizes[FRAMES] = frames_in_piece(pixels, num_frames) * frame_bytes(pixels)
        return sizes

    def compute(self, request: ResolvedRequest, tensors: Mapping[str, torch.Tensor], on_step: OnStep | None) -> Outputs:
        """Run the blocks for one request.

        `tensors` are other stages' outputs and the request's images (uint8, see `inputs`). Whatever `on_step`
        raises ends the work.

        Raises:
            torch.OutOfMemoryError: the GPU is too small, or torch's free memory is in pieces that are too small. From
                then on nothing is kept from one call to the next, so a second attempt has all of it in one piece.
        """
        torch.set_num_threads(self._settings.torch_threads)  # of this thread: torch keeps it a thread
        inputs: dict[str, Any] = {
            name: unpack(name, tensor.cpu().numpy(), request) if name in IMAGES else tensor.to(self.device)
            for name, tensor in tensors.items()
        }
        if self._short:
            torch.cuda.empty_cache()
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                made = self._cut.run(request, inputs, on_step)
        except torch.OutOfMemoryError:
            self._short = True
            raise
        if self._stream is not None:
            self._stream.synchronize()  # so that a timer around this call times the work
        videos = made.get(FRAMES)
        clip = None if videos is None else Clip(videos[0], made.get(SOUND))
        return Outputs({name: made[name] for name in self._outputs if name in made}, clip)

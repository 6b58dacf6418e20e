"""A pipeline in one process, without Ray and Mooncake."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import ConfigError
from disagg_ray.graph import build_graph
from disagg_ray.media.video import check_writer, encode, to_array
from disagg_ray.models.prompts import check_prompts
from disagg_ray.progress.events import Event, State
from disagg_ray.replica.stage import RAW, Stage
from disagg_ray.request import Request, ResolvedRequest, resolve
from disagg_ray.result import Result, StageTiming


class LocalPipeline:
    """Runs requests one after the other; has `Pipeline`'s blocking methods."""

    def __init__(self, config: Config, on_event: Callable[[Event], None] | None = None) -> None:
        """Load the stages; `on_event` is called with every request's progress.

        Raises:
            ConfigError: a stage is split over ranks, which are processes of their own.
        """
        check_alone(config)
        self.config = config
        self._on_event = on_event
        stages = {name: Stage(name, config) for name in config.stages}
        self.graph = build_graph([stage.ports for stage in stages.values()])
        self.stages = [stages[name] for name in self.graph.order]
        """In the order of the graph."""
        for stage in self.stages:
            stage.connect(self.graph)
            stage.load()

    @classmethod
    def from_config(cls, path: str | Path, *overrides: str) -> LocalPipeline:
        return cls(load_config(path, *overrides))

    def __enter__(self) -> LocalPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pools(self) -> dict[str, int]:
        """No stage of this pipeline has a pool."""
        return {}

    @property
    def weights(self) -> dict[str, dict[str, int]]:
        """Bytes of each component, by stage."""
        return {stage.name: stage.weights for stage in self.stages}

    def generate(self, request: Request) -> Result:
        """Generate one video; see `Pipeline.generate`."""
        resolved, images = resolve(request, self.config)
        check_prompts(resolved, self.config.model)
        check_writer(resolved.format)
        started = time.monotonic()
        tensors: dict[str, torch.Tensor] = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
        timings, clip = [], None
        for stage in self.stages:
            began, begin = time.time(), time.monotonic()
            wanted = {name: tensors[name] for name in stage.ports.inputs if name in tensors}
            self._report(resolved, stage.name, "running")
            outputs = stage.compute(resolved, wanted, partial(self._report, resolved, stage.name, "running"))
            outputs = outputs.checked(stage.name)
            self._report(resolved, stage.name, "done")
            tensors |= outputs.tensors
            clip = outputs.clip or clip
            timings.append(_timing(stage, began, time.monotonic() - begin))
        assert clip is not None, "the graph has exactly one stage that makes frames"
        raw = resolved.format in RAW
        begin = time.monotonic()
        data = None
        if not raw:
            data = encode(clip.frames, resolved.fps, resolved.format, self.config.output.scale, sound=clip.sound)
        timings[-1] = replace(timings[-1], encode_s=time.monotonic() - begin)
        seconds = time.monotonic() - started
        self._report(resolved, "", "done")
        sound = clip.sound if resolved.format == "npy" else None
        return Result(resolved, seconds, tuple(timings), data, clip.frames if raw else None, sound)

    def _report(self, request: ResolvedRequest, stage: str, state: State, step: int = 0, steps: int = 0) -> None:
        if self._on_event is not None:
            self._on_event(Event(request.id, stage, "local" if stage else "", 0, state, step, steps))

    def generate_all(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Generate videos one after the other."""
        for request in requests:
            yield self.generate(request)

    def close(self) -> None:
        """Drop the weights."""
        self.stages = []


def check_alone(config: Config) -> None:
    """Check that no stage is split over ranks.

    Raises:
        ConfigError: one is; names it.
    """
    for name, stage in config.stages.items():
        if any(group.parallel.is_gang for group in stage.replica_groups.values()):
            raise ConfigError(
                f"stages.{name}.parallel: a pipeline in one process has no ranks; leave parallel out, or run on Ray"
            )


def _timing(stage: Stage, began: float, seconds: float) -> StageTiming:
    return StageTiming(stage.name, "local", 0.0, 0.0, began, seconds, 0.0, 0, "local", stage.peak_bytes)

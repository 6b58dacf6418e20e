"""Frames equal the stock diffusers pipelines' bit for bit, wherever the model is cut and however tensors travel."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from splits import CUTS, FOUR, ONE, THREE, TWO, Load, Split, recut, start_splits

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import Cancelled
from disagg_ray.local import LocalPipeline
from disagg_ray.models.wan.shapes import get_shape
from disagg_ray.replica.sizing import frame_bytes
from disagg_ray.request import Request
from disagg_ray.transfer.pool import Pool

CONF = Path(__file__).parents[1] / "conf"

TASKS = ("t2v", "i2v", "flf2v", "a14b_t2v", "a14b_i2v")
IMAGE_TASKS = ("i2v", "flf2v", "a14b_i2v")
TWO_TRANSFORMERS = ("a14b_t2v", "a14b_i2v")

Arguments = dict[str, Any]

PLAIN: Arguments = {
    "prompt": "a red circle", "negative_prompt": "blurry", "image": (190, 130), "last_image": (130, 190), "height": 32,
    "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 5.0, "guidance_scale_2": 2.5, "seed": 7,
}  # fmt: skip
"""Of which a model gets those it takes; images are (width, height) here."""

GUIDED, UNGUIDED, TALL, LOW_NOISE_UNGUIDED = "guided", "unguided", "tall from a square", "low noise unguided"

CASES: dict[str, Arguments] = {
    GUIDED: {},
    UNGUIDED: {"image": (32, 32), "last_image": (32, 32), "height": 32, "width": 32, "num_frames": 9,
               "num_inference_steps": 2, "guidance_scale": 1.0, "prompt": "two", "seed": 2},
    TALL: {"image": (96, 96), "last_image": (32, 32), "height": 48, "width": 32, "prompt": "three", "seed": 2**63 - 1},
    LOW_NOISE_UNGUIDED: {"guidance_scale_2": 1.0},
}  # fmt: skip
"""What differs from `PLAIN`."""


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A tiny checkpoint: its configuration, and the stock pipeline of it."""

    task: str
    config: Config
    stock: Any
    make_image: Callable[..., Image.Image]
    expected: dict[str, np.ndarray] = field(default_factory=dict)

    def arguments(self, case: str) -> Arguments:
        asked = PLAIN | CASES[case]
        shape = get_shape(f"tiny-{self.task.replace('_', '-')}")
        takes = {
            "image": shape.takes_image,
            "last_image": shape.takes_last_image,
            "guidance_scale_2": shape.transformer_2 is not None,
        }
        asked = {name: value for name, value in asked.items() if takes.get(name, True)}
        if shape.expand_timesteps:  # TI2V, of text alone here: its sides are multiples of 32
            asked |= {side: asked[side] // 32 * 32 for side in ("height", "width")}
        images = {
            name: self.make_image(*asked[name], seed=len(name)) for name in ("image", "last_image") if takes[name]
        }
        return asked | images

    def request(self, case: str) -> Request:
        return Request(**self.arguments(case), format="npy")

    def expect(self, case: str) -> np.ndarray:
        """Return the stock pipeline's frames."""
        if case not in self.expected:
            arguments = self.arguments(case)
            generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
            length = self.config.model.max_sequence_length
            result = self.stock(**arguments, generator=generator, max_sequence_length=length)
            self.expected[case] = result.frames[0]
        return self.expected[case]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path], image: Callable[..., Image.Image]) -> Load[Model]:
    """Give a task's model, loaded once."""

    @cache
    def load(task: str, dtype: str = "float32", vae_dtype: str = "float32") -> Model:
        shape = get_shape(f"tiny-{task.replace('_', '-')}")
        folder = checkpoint(shape.name)
        wanted = {name: getattr(torch, dtype) for name in ("text_encoder", "transformer", "transformer_2")}
        wanted["vae"] = getattr(torch, vae_dtype)
        dtypes = {"default": torch.float32} | {name: wanted[name] for name in wanted if (folder / name).is_dir()}
        stock = getattr(diffusers, shape.pipeline).from_pretrained(folder, dtype=dtypes)
        stock.set_progress_bar_config(disable=True)
        precisions = f"model.dtype={{text_encoder: {dtype}, transformer: {dtype}, vae: {vae_dtype}}}"
        overrides = (f"model.path={folder}", precisions)
        small = (f"model.max_sequence_length={512 if task in ('i2v', 'flf2v') else 64}", "limits.max_pixels=4096",
                 "limits.max_frames=9", "defaults.num_frames=9",
                 "limits.max_image_pixels=24700")  # fmt: skip
        return Model(task, load_config(CONF / f"tiny_{task}.yaml", *overrides, *small), stock, image)

    return load


@pytest.fixture(scope="module")
def pipelines() -> Load[LocalPipeline]:
    """Give a model's stages in one process, loaded once a cut."""
    return cache(lambda model, cut: LocalPipeline(recut(model.config, cut)))


@pytest.fixture(scope="module")
def splits() -> Iterator[Load[Split]]:
    """Give a model's replicas, started once a cut; the driver's pool is common to all."""
    yield from start_splits(lambda model, cut=THREE: recut(model.config, cut))


def grid(tasks: Iterable[str] = TASKS, cuts: Iterable[str] = CUTS) -> list[tuple[str, str, str]]:
    """Return every (task, cut, case) that goes together."""
    return [
        (task, cut, case)
        for task, cut, case in product(tasks, cuts, CASES)
        if cut != (TWO if task in IMAGE_TASKS else FOUR) and (case != LOW_NOISE_UNGUIDED or task in TWO_TRANSFORMERS)
    ]


@pytest.mark.parametrize(("task", "cut", "case"), grid())
def test_stages_in_one_process_equal_stock(
    models: Load[Model], pipelines: Load[LocalPipeline], task: str, cut: str, case: str
) -> None:
    model = models(task)
    frames = pipelines(model, cut).generate(model.request(case)).frames
    assert np.array_equal(frames, model.expect(case))


@pytest.mark.parametrize(("task", "cut", "case"), [*grid(cuts=[THREE]), *grid(["i2v"], [FOUR])])
def test_replicas_equal_stock(models: Load[Model], splits: Load[Split], task: str, cut: str, case: str) -> None:
    model = models(task)
    split = splits(model, cut)
    assert np.array_equal(split.generate(model.request(case)), model.expect(case))
    assert split.bytes_in_use() == {}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first come", "last come"])
@pytest.mark.parametrize("task", TASKS)
def test_interleaved_requests_equal_each_alone(
    models: Load[Model], splits: Load[Split], task: str, order: tuple[int, int]
) -> None:
    model = models(task)
    split = splits(model)
    jobs = [split.submit(model.request(case)) for case in (GUIDED, UNGUIDED)]
    for stage in split.graph.order:
        for job in jobs:
            split.prefetch(job, stage)
        for place in order:
            split.run(jobs[place], stage)
    for job, case in zip(jobs, (GUIDED, UNGUIDED), strict=True):
        assert np.array_equal(split.collect(job), model.expect(case))
    assert split.bytes_in_use() == {}


def test_prefetch_while_another_request_computes_changes_neither(models: Load[Model], splits: Load[Split]) -> None:
    model = models("i2v")
    split = splits(model)
    jobs = [split.submit(model.request(case)) for case in (UNGUIDED, GUIDED)]
    with ThreadPoolExecutor() as threads:
        for stage in split.graph.order:
            running = threads.submit(split.run, jobs[0], stage)
            split.prefetch(jobs[1], stage)
            running.result()
            split.run(jobs[1], stage)
    for job, case in zip(jobs, (UNGUIDED, GUIDED), strict=True):
        assert np.array_equal(split.collect(job), model.expect(case))
    assert split.bytes_in_use() == {}


def test_slots_stay_until_every_consumer_is_done(models: Load[Model], splits: Load[Split]) -> None:
    model = models("i2v")
    split = splits(model, FOUR)
    job = split.submit(model.request(GUIDED))
    held = []
    for stage in split.graph.order:
        split.run(job, stage)
        held.append(set(split.bytes_in_use()))
    split.release(job)
    assert held[1:] == [{"driver", "text", "image"}, {"driver", "transformer"}, {"driver", "decoder"}]
    assert split.bytes_in_use() == {}


def test_frames_arrive_whole_in_pieces(
    models: Load[Model], splits: Load[Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("t2v")
    split = splits(model)
    monkeypatch.setattr("disagg_ray.replica.sizing.PIECE_BYTES", 2 * frame_bytes(32 * 48))
    job = split.submit(model.request(GUIDED))
    for stage in split.graph.order:
        split.run(job, stage)
    assert split.replicas["decoder"].piece(job.key, 4).tensors[0].spec.shape == (1, 32, 48, 3)
    assert np.array_equal(split.collect(job), model.expect(GUIDED))
    assert split.bytes_in_use() == {}


@pytest.mark.parametrize("task", ["i2v", "a14b_t2v"])
def test_result_does_not_depend_on_requests_before(models: Load[Model], task: str) -> None:
    model = models(task)
    order = (UNGUIDED, GUIDED, UNGUIDED)
    with LocalPipeline(model.config) as pipeline:
        results = [pipeline.generate(model.request(case)) for case in order]
    assert all(np.array_equal(r.frames, model.expect(case)) for r, case in zip(results, order, strict=True))


def test_cancelled_request_leaves_no_trace(
    models: Load[Model], splits: Load[Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("a14b_t2v")
    split = splits(model)
    job = split.submit(model.request(UNGUIDED))
    split.run(job, "encoder")
    with monkeypatch.context() as patch, pytest.raises(Cancelled, match="step 1 of 2"):
        patch.setattr(Pool, "is_released", lambda pool, key: key == job.key)
        split.run(job, "transformer")
    split.release(job)
    assert split.bytes_in_use() == {}
    assert np.array_equal(split.generate(model.request(GUIDED)), model.expect(GUIDED))


@pytest.mark.parametrize("case", [GUIDED, UNGUIDED])
@pytest.mark.parametrize("cut", [THREE, ONE])
@pytest.mark.parametrize("task", ["t2v", "i2v", "a14b_i2v"])
def test_bfloat16_stages_equal_stock(
    models: Load[Model], pipelines: Load[LocalPipeline], task: str, cut: str, case: str
) -> None:
    model = models(task, "bfloat16")
    frames = pipelines(model, cut).generate(model.request(case)).frames
    assert np.array_equal(frames, model.expect(case))
    assert not np.array_equal(frames, models(task).expect(case))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v", "a14b_i2v"])
def test_a_bfloat16_vae_equals_stock(
    models: Load[Model], pipelines: Load[LocalPipeline], task: str, dtype: str
) -> None:
    model = models(task, dtype, "bfloat16")
    frames = pipelines(model, THREE).generate(model.request(GUIDED)).frames
    assert np.array_equal(frames, model.expect(GUIDED))
    assert not np.array_equal(frames, models(task, dtype).expect(GUIDED))


def test_bfloat16_replicas_equal_stock(models: Load[Model], splits: Load[Split]) -> None:
    model = models("i2v", "bfloat16")
    split = splits(model)
    assert np.array_equal(split.generate(model.request(GUIDED)), model.expect(GUIDED))
    assert split.bytes_in_use() == {}


@pytest.mark.parametrize("cut", [THREE, ONE])
def test_kept_embeddings_change_no_bit(models: Load[Model], splits: Load[Split], cut: str) -> None:
    model = models("t2v")
    split = splits(model, cut)
    first = split.graph.order[0]
    handoffs, health = [], [split.replicas[first].health()]
    for case in (TALL, GUIDED, GUIDED):
        job = split.submit(model.request(case))
        for stage in split.graph.order:
            split.run(job, stage)
        handoffs.append([(meta.spec, meta.checksum) for meta in job.replies[first].handoff.tensors])
        health.append(split.replicas[first].health())
        assert np.array_equal(split.collect(job), model.expect(case))
    assert handoffs[1] == handoffs[2]
    assert (health[3].cache_hits - health[2].cache_hits, health[3].cache_misses) == (2, health[2].cache_misses)
    assert health[2].cache_hits > health[1].cache_hits, "the negative prompt was encoded for another request"
    assert split.bytes_in_use() == {}


def test_frames_are_the_same_without_a_cache(models: Load[Model], splits: Load[Split]) -> None:
    model = models("t2v")
    stages = {name: replace(stage, cache_bytes=0) for name, stage in model.config.stages.items()}
    split = Split(replace(model.config, stages=stages), splits(model).pool)
    for _ in range(2):
        assert np.array_equal(split.generate(model.request(GUIDED)), model.expect(GUIDED))
    health = split.replicas["encoder"].health()
    assert (health.cache_hits, health.cache_misses, health.bytes_kept) == (0, 4, 0)
    for replica in split.replicas.values():
        replica.close()


def test_configured_schedule_and_boundary_equal_stock(models: Load[Model]) -> None:
    model = models("a14b_t2v")
    settings = replace(model.config.model, flow_shift=7.0, boundary_ratio=0.97)
    scheduler = type(model.stock.scheduler).from_config(model.stock.scheduler.config, flow_shift=7.0)
    stock = type(model.stock)(**model.stock.components | {"scheduler": scheduler}, boundary_ratio=0.97)
    stock.set_progress_bar_config(disable=True)
    other = replace(model, stock=stock, config=replace(model.config, model=settings), expected={})
    with LocalPipeline(other.config) as pipeline:
        frames = pipeline.generate(other.request(GUIDED)).frames
    assert np.array_equal(frames, other.expect(GUIDED))
    assert not np.array_equal(frames, model.expect(GUIDED))

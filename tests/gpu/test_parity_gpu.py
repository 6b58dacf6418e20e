"""On GPUs too, frames equal the stock pipelines', wherever the model is cut and however tensors travel."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from splits import HOST, Split
from test_parity import CONF, GUIDED, UNGUIDED, Model

from disagg_ray import LocalPipeline, Pipeline, Request
from disagg_ray.config.load import load_config
from disagg_ray.config.transport import TransportConfig
from disagg_ray.models.blocks import OnStep
from disagg_ray.models.wan.shapes import get_shape
from disagg_ray.replica.stage import Outputs, Stage
from disagg_ray.request import ResolvedRequest
from disagg_ray.transfer.pool import Pool

CUDA = "cuda"
STAGES = ("encoder", "transformer", "decoder")
ON_GPU = tuple(f"stages.{stage}.device={CUDA}" for stage in STAGES)
SMALL = ("defaults.num_frames=9", "limits.max_pixels=4096", "limits.max_frames=9", "limits.max_image_pixels=24700")
T2V = CONF / "tiny_t2v.yaml"
REQUEST = Request(prompt="a red circle", height=48, width=80, num_frames=5, num_inference_steps=4, seed=7, format="npy")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule out what may differ between two runs of one kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=["t2v", "i2v", "a14b_t2v", "ti2v"])
def model(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], image: Callable[..., Image.Image]
) -> Model:
    task = request.param
    shape = get_shape(f"tiny-{task.replace('_', '-')}")
    folder = checkpoint(shape.name)
    stock = getattr(diffusers, shape.pipeline).from_pretrained(folder, dtype={"default": torch.float32}).to(CUDA)
    stock.set_progress_bar_config(disable=True)
    short = "model.max_sequence_length=512"
    config = load_config(CONF / f"tiny_{task}.yaml", f"model.path={folder}", short, *SMALL, *ON_GPU)
    return Model(task, config, stock, image)


@pytest.mark.parametrize("case", [GUIDED, UNGUIDED])
def test_stages_in_one_process_equal_stock(deterministic: None, model: Model, case: str) -> None:
    with LocalPipeline(model.config) as pipeline:
        frames = pipeline.generate(model.request(case)).frames
    assert np.array_equal(frames, model.expect(case))


def test_replicas_equal_stock(deterministic: None, model: Model) -> None:
    pool = Pool("driver", 2**20, HOST, TransportConfig())
    split = Split(model.config, pool)
    try:
        for case in (GUIDED, UNGUIDED):
            assert np.array_equal(split.generate(model.request(case)), model.expect(case))
        assert split.bytes_in_use() == {}
    finally:
        for part in (*split.replicas.values(), pool):
            part.close()


def expect(*overrides: str) -> np.ndarray:
    """Return the frames of the stages in one process, under torch's default settings, as in replicas."""
    with LocalPipeline.from_config(T2V, *overrides) as pipeline:
        frames = pipeline.generate(REQUEST).frames
    assert frames is not None
    return frames


@pytest.mark.parametrize(
    ("shares", "routes"),
    [
        pytest.param((0.5, 1, 0.5), ("nvlink_intra", "nvlink_intra"), marks=two_gpus, id="two GPUs"),
        pytest.param((0.3, 0.3, 0.3), ("nvlink_intra", "nvlink_intra"), id="one GPU in thirds"),
        pytest.param((0, 0.5, 0.5), ("tcp", "nvlink_intra"), id="encoder on the CPU"),
    ],
)
def test_pipeline_equals_local(cluster: None, shares: tuple[float, ...], routes: tuple[str, ...]) -> None:
    asked = [f"stages.{stage}.num_gpus={share}" for stage, share in zip(STAGES, shares, strict=True)]
    on_cpu = [f"stages.{stage}.device=cpu" for stage, share in zip(STAGES, shares, strict=True) if not share]
    with Pipeline.from_config(T2V, *asked) as pipeline:
        results = [pipeline.generate(REQUEST) for _ in range(2)]
    expected = expect(*ON_GPU, *on_cpu)
    for result in results:
        assert result.frames is not None
        assert np.array_equal(result.frames, expected)
        taken = tuple(stage.route for stage in result.stages[1:])
        print("routes:", taken, "peaks:", [stage.peak_bytes for stage in result.stages])
        assert taken == routes
    assert all((stage.peak_bytes > 0) == (share > 0) for stage, share in zip(result.stages, shares, strict=True))


def test_fused_equals_local(cluster: None) -> None:
    with Pipeline.from_config(T2V, "fused=true", *(f"stages.{stage}.num_gpus=1" for stage in STAGES)) as pipeline:
        (replica,) = pipeline.replicas
        result = pipeline.generate(REQUEST)
    assert replica.device == CUDA
    assert np.array_equal(result.frames, expect(*ON_GPU))


def test_requests_in_turn_equal_each_alone(cluster: None) -> None:
    """Later requests are pulled while earlier ones compute."""
    requests = [
        Request(prompt=f"a red circle {i}", seed=i, height=48, width=80, num_frames=5, format="npy", id=str(i))
        for i in range(6)
    ]
    with LocalPipeline.from_config(T2V, *ON_GPU) as local:
        expected = {request.id: local.generate(request).frames for request in requests}
    with Pipeline.from_config(T2V, *(f"stages.{stage}.num_gpus=0.3" for stage in STAGES)) as pipeline:
        results = {result.request.id: result.frames for result in pipeline.generate_all(requests)}
    assert results.keys() == expected.keys()
    for name, frames in results.items():
        assert np.array_equal(frames, expected[name])


def test_replicas_compute_beside_the_default_stream(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull by nvlink_intra waits for the default stream: a stage that computed there would hold up its prefetch."""
    pool = Pool("driver", 2**20, HOST, TransportConfig())
    split, streams, compute = Split(model.config, pool), [], Stage.compute

    def watch(stage: Stage, request: ResolvedRequest, tensors: dict[str, torch.Tensor], on_step: OnStep) -> Outputs:
        def note_stream(step: int, steps: int) -> None:
            streams.append(torch.cuda.current_stream())
            on_step(step, steps)

        return compute(stage, request, tensors, note_stream)

    monkeypatch.setattr(Stage, "compute", watch)
    split.generate(model.request(UNGUIDED))
    for part in (*split.replicas.values(), pool):
        part.close()
    assert streams
    assert torch.cuda.default_stream() not in streams

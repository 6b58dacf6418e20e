"""What a stage takes of its GPU is what its weights need."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import connect_stages
from test_parity_gpu import ON_GPU, T2V
from worker import MIB

from disagg_ray.config.load import load_config
from disagg_ray.models.random import make_checkpoint
from disagg_ray.models.wan import shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_largest_tensor_leaves_no_hole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With other memory free, as beside a pool, 128 MB of word embeddings are loaded into the piece that waits."""
    tiny = shapes.get_shape("tiny-t2v")
    words = replace(tiny, name="many-words", text_encoder=replace(tiny.text_encoder, vocab_size=2**20))
    monkeypatch.setitem(shapes.SHAPES, words.name, words)
    folder = make_checkpoint(words.name, tmp_path / "checkpoint")
    config = load_config(T2V, f"model.path={folder}", *ON_GPU)
    encoder = connect_stages(config)["encoder"]
    torch.cuda.empty_cache()
    pool = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")  # torch takes 20 MB for it
    free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    encoder.load()
    assert encoder.weights["text_encoder"] > 128 * MIB
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - free < 64 * MIB
    del pool

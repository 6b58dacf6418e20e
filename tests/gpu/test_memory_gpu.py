"""What a stage takes of its GPU is what its weights need."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_parity import CONF

from disagg_ray.graph import build_graph
from disagg_ray.loading import load_config
from disagg_ray.models import shapes
from disagg_ray.models.maker import make_checkpoint
from disagg_ray.stage import Stage

MIB = 2**20
STAGES = ("encoder", "transformer", "decoder")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_largest_tensor_leaves_no_hole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With other memory free, as beside a pool, 256 MB of word embeddings are loaded into the piece that waits."""
    tiny = shapes.get_shape("tiny-t2v")
    words = replace(tiny, name="many-words", text_encoder=replace(tiny.text_encoder, vocab_size=2**21))
    monkeypatch.setitem(shapes.SHAPES, words.name, words)
    folder = make_checkpoint(words.name, tmp_path / "checkpoint")
    config = load_config(CONF / "tiny_t2v.yaml", f"model.path={folder}", *(f"stages.{s}.device=cuda" for s in STAGES))
    stages = {name: Stage(name, config) for name in STAGES}
    stages["encoder"].connect(build_graph([stage.ports for stage in stages.values()]))
    torch.cuda.empty_cache()
    pool = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")  # torch takes 20 MB for it
    free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    stages["encoder"].load()
    assert stages["encoder"].weights["text_encoder"] > 256 * MIB
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - free < 64 * MIB
    del pool

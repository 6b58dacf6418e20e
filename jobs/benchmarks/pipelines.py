"""The stock diffusers pipeline of a checkpoint: the baseline of measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch


def load_stock_pipeline(folder: Path, dtypes: Mapping[str, str], device: str) -> Any:
    """Load a checkpoint as diffusers users do: components in these precisions, all others in float32."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = getattr(diffusers, index["_class_name"])
    wanted = {name: getattr(torch, dtype) for name, dtype in dtypes.items() if index.get(name, [None])[0] is not None}
    given = {"default": torch.float32} | wanted
    pipeline = kind.from_pretrained(folder, dtype=given, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)

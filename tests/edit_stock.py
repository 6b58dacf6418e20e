"""The stock pipelines that edit images, of the tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from transformers import AutoImageProcessor

from disagg_ray import Request
from disagg_ray.models.qwen_image.edit import Processor
from disagg_ray.models.qwen_image.random import make_tokenizer


def load_stock(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Callable[[Request], np.ndarray]:
    """Return what gives a stock pipeline's image of a request, of the size of its formula at the tiny models' area."""
    processor = Processor(AutoImageProcessor.from_pretrained(folder / "processor"), make_tokenizer())
    stock = getattr(diffusers, name).from_pretrained(folder, processor=processor, dtype=dtype)
    stock.set_progress_bar_config(disable=True)

    def make(asked: Request) -> np.ndarray:
        given: Any = asked.image or asked.reference_images
        last = given[-1] if isinstance(given, list) else given
        width, height = calculate_dimensions(64 * 64, last.width / last.height)
        made: np.ndarray = stock(
            given, asked.prompt, asked.negative_prompt, true_cfg_scale=asked.guidance_scale,
            height=asked.height or height, width=asked.width or width, num_inference_steps=asked.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(asked.seed), output_type="np",
        ).images  # fmt: skip
        return made

    return make

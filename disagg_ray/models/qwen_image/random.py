"""Builds the components of Qwen-Image's shapes, without weights."""

from dataclasses import asdict
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import normalizers

from disagg_ray.models.qwen_image.edit_text import RESERVED
from disagg_ray.models.qwen_image.shapes import Shape
from disagg_ray.models.random import arguments, byte_tokenizer

PIXELS = {"shortest_edge": 3136, "longest_edge": 12544}
"""The least and the most that the text encoder sees of an image, few for a small machine."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *RESERVED, "<|vision_start|>", "<|vision_end|>")
"""Tokens 256 to 262."""


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        return {
            "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(_text_encoder_config(shape)),
            "vae": diffusers.AutoencoderKLQwenImage(**arguments(shape.vae)),
            "transformer": diffusers.QwenImageTransformer2DModel(**arguments(shape.transformer)),
        }


def build_others(shape: Shape) -> dict[str, Any]:
    """Every component without weights, by its name in the pipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**arguments(shape.scheduler))
    others = {"tokenizer": make_tokenizer(), "scheduler": scheduler}
    if shape.processor is not None:
        others["processor"] = transformers.Qwen2VLImageProcessorPil(size=PIXELS, **asdict(shape.processor))
    return others


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as Qwen2's in all but its vocabulary: one token a byte, and what marks the turns of a chat."""
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_max_length=131072,
    )


def _text_encoder_config(shape: Shape) -> transformers.Qwen2_5_VLConfig:
    given = arguments(shape.text_encoder)
    vision = {key.removeprefix("vision_"): given.pop(key) for key in list(given) if key.startswith("vision_")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": given.pop("mrope_section")}
    marks = zip(("image", "video", "vision_start", "vision_end"), given.pop("mark_tokens"), strict=True)
    return transformers.Qwen2_5_VLConfig(
        text_config={**given, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config={**vision, "out_hidden_size": shape.text_encoder.hidden_size},
        **{f"{name}_token_id": token for name, token in marks},
    )

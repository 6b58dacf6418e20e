"""Builds the components of LTX-2's shapes, without weights."""

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tokenizers import processors

from disagg_ray.models.ltx2.component_configs import TextEncoderConfig
from disagg_ray.models.ltx2.shapes import Shape
from disagg_ray.models.random import arguments, byte_tokenizer

SPECIAL = ("<pad>", "<eos>", "<bos>")


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        return {
            "text_encoder": transformers.Gemma3ForConditionalGeneration(_text_encoder_config(shape.text_encoder)),
            "connectors": LTX2TextConnectors(**arguments(shape.connectors)),
            "vae": diffusers.AutoencoderKLLTX2Video(**arguments(shape.vae)),
            "audio_vae": diffusers.AutoencoderKLLTX2Audio(**arguments(shape.audio_vae)),
            "vocoder": LTX2Vocoder(**arguments(shape.vocoder)),
            "transformer": diffusers.LTX2VideoTransformer3DModel(**arguments(shape.transformer)),
        }


def build_others(shape: Shape) -> dict[str, Any]:
    """Every component without weights, by its name in the pipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**arguments(shape.scheduler))
    return {"tokenizer": make_tokenizer(), "scheduler": scheduler}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as Gemma's in all but its vocabulary: one token a byte, and one where a text begins."""
    tokenizer = byte_tokenizer(first=SPECIAL)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        bos_token=SPECIAL[2],
        model_max_length=1024,
        padding_side="left",
    )


def _text_encoder_config(config: TextEncoderConfig) -> transformers.Gemma3Config:
    given = arguments(config)
    vision = {key.removeprefix("vision_"): given.pop(key) for key in list(given) if key.startswith("vision_")}
    tokens = (config.vision_image_size // config.vision_patch_size // 4) ** 2  # of an image, each of 4 x 4
    rest = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return transformers.Gemma3Config(
        text_config={**given, **rest}, vision_config=vision, mm_tokens_per_image=tokens,
        boi_token_index=3, eoi_token_index=4, image_token_index=5,
    )  # fmt: skip

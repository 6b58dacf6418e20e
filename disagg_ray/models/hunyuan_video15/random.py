"""Builds the components of HunyuanVideo 1.5's shapes, without weights."""

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import AddedToken, normalizers

from disagg_ray.models.hunyuan_video15.component_configs import TextEncoderConfig
from disagg_ray.models.hunyuan_video15.shapes import Shape
from disagg_ray.models.hunyuan_video15.text import BEFORE, NUM_DROPPED, SYSTEM
from disagg_ray.models.random import arguments, byte_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Tokens 256 to 258."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen2.5-VL's chat template does with texts."""


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        made = {
            "text_encoder": transformers.Qwen2_5_VLTextModel(_text_encoder_config(shape.text_encoder)),
            "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(**asdict(shape.text_encoder_2))),
            "vae": diffusers.AutoencoderKLHunyuanVideo15(**arguments(shape.vae)),
            "transformer": diffusers.HunyuanVideo15Transformer3DModel(**arguments(shape.transformer)),
        }
        if shape.image_encoder is not None:
            sees = transformers.SiglipVisionConfig(**asdict(shape.image_encoder))
            made["image_encoder"] = transformers.SiglipVisionModel(sees)
        return made


def build_others(shape: Shape) -> dict[str, Any]:
    """Every component without weights, by its name in the pipeline."""
    others = {
        "tokenizer": make_tokenizer(),
        "tokenizer_2": transformers.ByT5Tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**arguments(shape.scheduler)),
        "guider": diffusers.ClassifierFreeGuidance(**arguments(shape.guider)),
    }
    if shape.image_encoder is not None:
        sides = dict.fromkeys(("height", "width"), shape.image_encoder.image_size)
        others["feature_extractor"] = transformers.SiglipImageProcessorPil(size=sides)
    return others


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as Qwen2's in all but its vocabulary: one token a byte, and as many before a prompt as it makes."""
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(list(SPECIAL))
    rest = len(BEFORE) - len(SYSTEM) - sum(BEFORE.count(mark) * (len(mark) - 1) for mark in SPECIAL)
    length = len(SYSTEM) // (NUM_DROPPED - rest)  # of all but the first piece: none of them begins another
    ends = [0, *range(len(SYSTEM) - length * (NUM_DROPPED - rest - 1), len(SYSTEM) + 1, length)]
    tokenizer.add_tokens([AddedToken(SYSTEM[i:j], normalized=False) for i, j in pairwise(ends)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_max_length=131072,
        chat_template=CHAT,
    )


def _text_encoder_config(config: TextEncoderConfig) -> Any:
    half = config.hidden_size // config.num_attention_heads // 2
    sections = [half // 4, half * 3 // 8, half * 3 // 8]  # by time, row and column
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    kind = transformers.Qwen2_5_VLTextModel.config_class
    return kind(**asdict(config), rope_parameters=rope, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None)

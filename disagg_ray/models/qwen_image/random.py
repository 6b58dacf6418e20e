"""Builds the components of Qwen-Image's shapes, without weights."""

from dataclasses import asdict
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from disagg_ray.models.qwen_image.component_configs import TextEncoderConfig
from disagg_ray.models.qwen_image.shapes import Shape

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        return {
            "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(_text_encoder_config(shape.text_encoder)),
            "vae": diffusers.AutoencoderKLQwenImage(**_arguments(shape.vae)),
            "transformer": diffusers.QwenImageTransformer2DModel(**_arguments(shape.transformer)),
        }


def build_others(shape: Shape) -> dict[str, Any]:
    """Every component without weights, by its name in the pipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**_arguments(shape.scheduler))
    return {"tokenizer": make_tokenizer(), "scheduler": scheduler}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as Qwen2's in all but its vocabulary: one token a byte, and what marks the turns of a chat."""
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_max_length=131072,
    )


def _text_encoder_config(config: TextEncoderConfig) -> transformers.Qwen2_5_VLConfig:
    given = _arguments(config)
    vision = {key: given.pop(f"vision_{key}") for key in ("depth", "hidden_size", "intermediate_size", "num_heads")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": given.pop("mrope_section")}
    return transformers.Qwen2_5_VLConfig(
        text_config={**given, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config={**vision, "out_hidden_size": config.hidden_size},
    )


def _arguments(config: Any) -> dict[str, Any]:
    """Keyword arguments of the component; its constructor wants lists for sequences, as JSON gives them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}

"""Builds the components of LTX-2's shapes, without weights."""

from dataclasses import asdict
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from disagg_ray.models.ltx2.component_configs import TextEncoderConfig
from disagg_ray.models.ltx2.shapes import Shape

SPECIAL = ("<pad>", "<eos>", "<bos>")


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        return {
            "text_encoder": transformers.Gemma3ForConditionalGeneration(_text_encoder_config(shape.text_encoder)),
            "connectors": LTX2TextConnectors(**_arguments(shape.connectors)),
            "vae": diffusers.AutoencoderKLLTX2Video(**_arguments(shape.vae)),
            "audio_vae": diffusers.AutoencoderKLLTX2Audio(**_arguments(shape.audio_vae)),
            "vocoder": LTX2Vocoder(**_arguments(shape.vocoder)),
            "transformer": diffusers.LTX2VideoTransformer3DModel(**_arguments(shape.transformer)),
        }


def build_others(shape: Shape) -> dict[str, Any]:
    """Every component without weights, by its name in the pipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**_arguments(shape.scheduler))
    return {"tokenizer": make_tokenizer(), "scheduler": scheduler}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as Gemma's in all but its vocabulary: one token a byte, and one where a text begins."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
    given = _arguments(config)
    vision = {key.removeprefix("vision_"): given.pop(key) for key in list(given) if key.startswith("vision_")}
    tokens = (config.vision_image_size // config.vision_patch_size // 4) ** 2  # of an image, each of 4 x 4
    rest = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return transformers.Gemma3Config(
        text_config={**given, **rest}, vision_config=vision, mm_tokens_per_image=tokens,
        boi_token_index=3, eoi_token_index=4, image_token_index=5,
    )  # fmt: skip


def _arguments(config: Any) -> dict[str, Any]:
    """Keyword arguments of the component; its constructor wants lists for sequences, as JSON gives them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}

"""Builds the components of Wan's shapes, without weights or of random ones."""

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from disagg_ray.models.random import arguments, draw, floating_dtype
from disagg_ray.models.wan.component_configs import (
    ImageEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaceTransformerConfig,
    VaeConfig,
)
from disagg_ray.models.wan.shapes import Shape

ComponentConfig = TextEncoderConfig | ImageEncoderConfig | VaeConfig | TransformerConfig | SchedulerConfig

MAX_PROMPT_TOKENS = 512
"""Tokens of a prompt with its end, as the published tokenizers announce them."""


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        built: dict[str, torch.nn.Module | None] = {
            "text_encoder": _transformers_model("UMT5EncoderModel", "UMT5Config", shape.text_encoder),
            "image_encoder": _transformers_model("CLIPVisionModel", "CLIPVisionConfig", shape.image_encoder),
            "vae": _diffusers_component("AutoencoderKLWan", shape.vae),
            "transformer": _transformer(shape.transformer),
            "transformer_2": _transformer(shape.transformer_2),
        }
    return {name: module for name, module in built.items() if module is not None}


def build_others(shape: Shape) -> dict[str, Any]:
    """Every component without weights, by its name in the pipeline."""
    others: dict[str, Any] = {
        "tokenizer": make_tokenizer(),
        "scheduler": _diffusers_component("UniPCMultistepScheduler", shape.scheduler),
    }
    if shape.image_encoder:
        others["image_processor"] = _image_processor(shape.image_encoder)
    return others


def build_random(config: TransformerConfig, dtype: str, device: str, seed: int = 0) -> Any:
    """Return a transformer of seeded random weights, in the precisions that diffusers would load it in.

    Nothing is written; needs memory on the device for the weights alone.
    """
    with torch.device("meta"):
        module: Any = _transformer(config)
    rope = type(module.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)  # a table
    draw(module, floating_dtype(dtype), torch.Generator(device).manual_seed(seed))
    module.rope = rope.to(device)
    for name, parameter in module.named_parameters():
        if set(module._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.float()
    return module.eval().requires_grad_(False)


def build_component(shape: Shape, name: str, dtype: str, device: str, seed: int = 0) -> Any:
    """Return a text encoder or VAE of seeded random weights; nothing is written."""
    module: Any = build_meta(shape)[name]
    draw(module, floating_dtype(dtype), torch.Generator(device).manual_seed(seed))
    return module.eval().requires_grad_(False)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as UMT5's in all but its vocabulary: one token a printable ASCII character, else one a UTF-8 byte.

    It has 354 tokens: 0 pads, 1 ends, 2 is unknown (and never needed).
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    byte_tokens = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    characters = [(character, -2.0) for character in ("▁", *map(chr, range(ord("!"), ord("~") + 1)))]
    tokenizer = Tokenizer(models.Unigram([*special, *byte_tokens, *characters], unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_PROMPT_TOKENS,
    )


def _transformers_model(model: str, configuration: str, config: ComponentConfig | None) -> Any:
    if config is None:
        return None
    return getattr(transformers, model)(getattr(transformers, configuration)(**arguments(config)))


def _diffusers_component(component: str, config: ComponentConfig | None) -> Any:
    return None if config is None else getattr(diffusers, component)(**arguments(config))


def _transformer(config: TransformerConfig | None) -> Any:
    vace = isinstance(config, VaceTransformerConfig)
    return _diffusers_component("WanVACETransformer3DModel" if vace else "WanTransformer3DModel", config)


def _image_processor(config: ImageEncoderConfig) -> Any:
    side = config.image_size
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

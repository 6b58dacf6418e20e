"""Blocks before the denoise: texts, and what is seen of a first frame.

They compute exactly what diffusers 0.42's `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline` compute.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.hunyuan_video1_5.encoders import (
    HunyuanVideo15ImageEncoderStep,
    HunyuanVideo15VaeEncoderStep,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, Qwen2_5_VLTextModel, T5EncoderModel

from disagg_ray.models.blocks import KeepsTexts
from disagg_ray.models.hunyuan_video15.geometry import PARTS, TEXTS
from disagg_ray.models.hunyuan_video15.text import MOST_QUOTED, NUM_DROPPED, check, prepare, quoted
from disagg_ray.models.prompts import check_length

LAYER = -3
"""Of the text encoder, whose output is the embedding."""


class TextEncoder(KeepsTexts, ModularPipelineBlocks):  # type: ignore[misc]
    """Encodes the prompt, under guidance the negative prompt too, and refuses to truncate.

    Diffusers' block reads the transformer's precision, which another stage holds, and misses texts in curly quotes.
    """

    model_name = "hunyuan-video-1.5"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("text_encoder", Qwen2_5_VLTextModel),
            ComponentSpec("tokenizer", PreTrainedTokenizerBase),
            ComponentSpec("text_encoder_2", T5EncoderModel),
            ComponentSpec("tokenizer_2", ByT5Tokenizer),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("request", required=True), InputParam("max_sequence_length", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(f"{text}_{part}") for text in TEXTS for part in PARTS]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        request, most = state.get("request"), state.get("max_sequence_length")
        texts = {field: getattr(request, field) for field in (TEXTS if request.guided else TEXTS[:1])}
        for field, text in texts.items():
            check(field, text)
            check_length(field, components.tokenizer, prepare(text), most, NUM_DROPPED)
        for field, text in texts.items():
            encode = cache(partial(_encode, components, text, most))
            for part in PARTS:
                made = self.keep((text, most, part), lambda encode=encode, part=part: encode()[part])  # type: ignore[misc]
                state.set(f"{field}_{part}", made)
        return components, state


def _encode(components: Any, text: str, most: int) -> dict[str, Tensor]:
    """Return the embeddings of a text and of what it quotes, and their masks, by `PARTS`."""
    device, tokenizer = components._execution_device, components.tokenizer
    padded = {"padding": "max_length", "return_tensors": "pt"}
    tokens = tokenizer([prepare(text)], add_special_tokens=False, max_length=most + NUM_DROPPED, **padded).to(device)
    ids, mask = tokens.input_ids, tokens.attention_mask
    hidden = components.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    own = hidden[LAYER][:, NUM_DROPPED:], mask[:, NUM_DROPPED:]

    encoder, found = components.text_encoder_2, quoted(text)
    if found is None:
        none = torch.zeros(1, MOST_QUOTED, encoder.config.d_model, device=device, dtype=encoder.dtype)
        return dict(
            zip(PARTS, (*own, none, torch.zeros(1, MOST_QUOTED, device=device, dtype=torch.int64)), strict=True)
        )
    tokens = components.tokenizer_2([found], max_length=MOST_QUOTED, **padded).to(device)
    ids, mask = tokens.input_ids, tokens.attention_mask
    return dict(zip(PARTS, (*own, encoder(input_ids=ids, attention_mask=mask.float())[0], mask), strict=True))


class ImageEncoder(HunyuanVideo15ImageEncoderStep):  # type: ignore[misc]
    """Encodes the image as stock does, cropped to the video's size; diffusers' relies on the VAE's block before it."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        crops = [spec for spec in HunyuanVideo15VaeEncoderStep().expected_components if spec.name == "video_processor"]
        return [*super().expected_components, *crops]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam("height", required=True), InputParam("width", required=True)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        components.image_encoder.use_head = False  # its output is not used, and offload in groups cannot follow it
        size = {"height": state.get("height"), "width": state.get("width")}
        state.set("image", components.video_processor.resize(state.get("image"), **size, resize_mode="crop"))
        made: tuple[Any, Any] = super().__call__(components, state)
        return made

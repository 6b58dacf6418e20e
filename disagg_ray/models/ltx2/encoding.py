"""Blocks before the denoise: texts, and a first frame.

They compute exactly what diffusers 0.42's `LTX2Pipeline` and `LTX2ImageToVideoPipeline` compute.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration, PreTrainedTokenizerBase

from disagg_ray.models.blocks import KeepsTexts
from disagg_ray.models.first_frame import EncodeFirstFrame
from disagg_ray.models.ltx2.text import prepare
from disagg_ray.models.prompts import check_length

EMBEDS = ("connector_prompt_embeds", "connector_audio_prompt_embeds", "connector_attention_mask")
"""For video and for sound, (texts, tokens, width), and which tokens count, int64 (texts, tokens). Under guidance there
are two texts, the negative one first."""


class TextEncoder(KeepsTexts, ModularPipelineBlocks):  # type: ignore[misc]
    """Encodes the prompt, under guidance with the negative prompt, and refuses to truncate.

    What the text encoder makes is 49 times as wide as what the connectors make of it, so both are one block.
    """

    model_name = "ltx2"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("text_encoder", Gemma3ForConditionalGeneration),
            ComponentSpec("tokenizer", PreTrainedTokenizerBase),
            ComponentSpec("connectors", LTX2TextConnectors),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("request", required=True), InputParam("max_sequence_length", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name) for name in EMBEDS]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        request, most = state.get("request"), state.get("max_sequence_length")
        texts = {"negative_prompt": request.negative_prompt} if request.guided else {}
        texts |= {"prompt": request.prompt}
        for field, text in texts.items():
            check_length(field, components.tokenizer, prepare(text), most)
        asked = (*texts.values(), most)
        made: list[tuple[Tensor, ...]] = []

        def encode(index: int) -> Tensor:
            if not made:
                made.append(_encode(components, list(texts.values()), most))
            return made[0][index]

        for index, name in enumerate(EMBEDS):
            state.set(name, self.keep((*asked, name), lambda index=index: encode(index)))  # type: ignore[misc]
        return components, state


def _encode(components: Any, texts: list[str], most: int) -> tuple[Tensor, ...]:
    """Return the embeddings and their mask of texts, which are encoded one by one and connected together."""
    tokenizer, encoder = components.tokenizer, components.text_encoder
    tokenizer.padding_side = "left"
    embeds, masks = [], []
    for text in texts:
        tokens = tokenizer([prepare(text)], padding="max_length", max_length=most, return_tensors="pt")
        ids, mask = (tokens[name].to(components._execution_device) for name in ("input_ids", "attention_mask"))
        # without logits_to_keep it would score its whole vocabulary for each token
        hidden = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1).hidden_states
        embeds.append(torch.stack(hidden, dim=-1).flatten(2, 3).to(encoder.dtype))
        masks.append(mask)
    made: tuple[Tensor, ...] = components.connectors(torch.cat(embeds), torch.cat(masks), padding_side="left")
    return made


class EncodeImage(EncodeFirstFrame):
    """Makes latents of the request's image, if it has one.

    Equal to stock with `image_crf=0`: its default compresses the image as H.264 first, with a library of its own.
    """

    model_name = "ltx2"
    processor = "image_processor"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        config = FrozenDict({"vae_scale_factor": 32, "resample": "bilinear"})
        processor = ComponentSpec(
            "image_processor", VideoProcessor, config=config, default_creation_method="from_config"
        )
        return [ComponentSpec("vae", AutoencoderKLLTX2Video), processor]

    @staticmethod
    def normalise(vae: Any, latents: Tensor) -> Tensor:
        mean, std = (numbers.view(1, -1, 1, 1, 1).to(latents) for numbers in (vae.latents_mean, vae.latents_std))
        normalised: Tensor = (latents - mean) * 1.0 / std  # stock leaves its scaling_factor out here
        return normalised

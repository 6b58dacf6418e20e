"""Blocks of Qwen-Image-Edit: an image of a text and of an image.

Each takes the place of one block of diffusers 0.42 and computes exactly what `QwenImageEditPipeline` computes. The
image is seen twice, at one size: by the text encoder, as a part of each text, and by the transformer, as latents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.qwenimage.before_denoise import QwenImageEditRoPEInputsStep
from diffusers.modular_pipelines.qwenimage.decoders import QwenImageAfterDenoiseStep
from diffusers.modular_pipelines.qwenimage.denoise import QwenImageEditDenoiseStep, QwenImageEditLoopBeforeDenoiser
from diffusers.modular_pipelines.qwenimage.encoders import (
    QwenImageEditProcessImagesInputStep,
    QwenImageVaeEncoderStep,
    encode_vae_image,
    get_qwen_prompt_embeds_edit,
)
from transformers import ProcessorMixin, Qwen2VLProcessor

from disagg_ray.config.traits import nearest_sides
from disagg_ray.media.video import digest_pixels
from disagg_ray.models.qwen_image import edit_text
from disagg_ray.models.qwen_image.blocks import Denoiser, Stepper, TextEncoder, TextInput
from disagg_ray.models.qwen_image.geometry import SEEN_PIXELS, SEEN_STEP

IMAGE_LATENTS = "image_latents"
"""Latents of the request's image, float32 (1, channels, 1, height, width)."""


class Processor(Qwen2VLProcessor):  # type: ignore[misc]
    """What stock hands texts and images to, without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_token, self.video_token = edit_text.RESERVED
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(list(edit_text.RESERVED))
        ProcessorMixin.__init__(self, image_processor, tokenizer)


class EditTextEncoder(TextEncoder):
    """Encodes each text with the image in it."""

    text = edit_text

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, ComponentSpec("processor", Qwen2VLProcessor), *_resizer()]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam("image", required=True)]

    def encoder(self, components: Any, state: Any) -> tuple[Hashable, Callable[[str], torch.Tensor]]:
        image = state.get("image")
        return digest_pixels(image), partial(self._encode_with, components, _resize(components, image))

    def _encode_with(self, components: Any, image: Any, text: str) -> torch.Tensor:
        processor = Processor(components.processor, components.tokenizer)
        given = {
            "prompt_template_encode": edit_text.TEMPLATE,
            "prompt_template_encode_start_idx": edit_text.NUM_DROPPED,
        }
        device = components._execution_device
        embeds, _ = get_qwen_prompt_embeds_edit(components.text_encoder, processor, text, image, **given, device=device)
        made: torch.Tensor = embeds
        return made


class EncodeImage(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes latents of the request's image."""

    model_name = "qwenimage"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*QwenImageVaeEncoderStep().expected_components, *_resizer()]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("image", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(IMAGE_LATENTS)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        vae, image = components.vae, _resize(components, state.get("image"))
        pixels = components.image_processor.preprocess(image, image.height, image.width)
        place = {"device": components._execution_device, "dtype": vae.dtype}
        latents = encode_vae_image(pixels, vae, generator=None, **place, latent_channels=vae.config.z_dim)
        state.set(IMAGE_LATENTS, latents.float())
        return components, state


class EditInput(TextInput):
    """Packs the image's latents into tokens, in the transformer's precision."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, *QwenImageAfterDenoiseStep().expected_components]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam(IMAGE_LATENTS, required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [*super().intermediate_outputs, OutputParam("image_height"), OutputParam("image_width")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        components, state = super().__call__(components, state)
        latents = state.get(IMAGE_LATENTS)
        for name, side in zip(("image_height", "image_width"), latents.shape[-2:], strict=True):
            state.set(name, side * components.vae_scale_factor)
        state.set(IMAGE_LATENTS, components.pachifier.pack_latents(latents.to(components.transformer.dtype)))
        return components, state


class EditRopeInputs(QwenImageEditRoPEInputsStep):  # type: ignore[misc]
    """Does without masks."""

    @property
    def inputs(self) -> list[InputParam]:
        return [param for param in super().inputs if not param.name.endswith("mask")]


class EditDenoise(QwenImageEditDenoiseStep):  # type: ignore[misc]
    """Denoises with the image's tokens beside those of what is made."""

    block_classes: ClassVar = [QwenImageEditLoopBeforeDenoiser, Denoiser, Stepper]


def _resizer() -> list[ComponentSpec]:
    return list(QwenImageEditProcessImagesInputStep().expected_components)


def _resize(components: Any, image: Any) -> Any:
    """Return the image at the size at which the model sees every one: about `SEEN_PIXELS` of its aspect."""
    sides = nearest_sides(SEEN_PIXELS, image.height, image.width, SEEN_STEP)
    processor: VaeImageProcessor = components.image_processor
    return processor.resize(image, *sides)

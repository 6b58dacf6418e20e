"""Blocks of Qwen-Image-Edit: an image of a text and of an image, or of several.

Each takes the place of one block of diffusers 0.42 and computes exactly what `QwenImageEditPipeline` or
`QwenImageEditPlusPipeline` computes. Each image is seen twice: by the text encoder, as a part of each text, and by the
transformer, as latents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.qwenimage.decoders import QwenImageAfterDenoiseStep
from diffusers.modular_pipelines.qwenimage.denoise import QwenImageEditDenoiseStep, QwenImageEditLoopBeforeDenoiser
from diffusers.modular_pipelines.qwenimage.encoders import (
    QwenImageEditProcessImagesInputStep,
    QwenImageVaeEncoderStep,
    encode_vae_image,
    get_qwen_prompt_embeds_edit_plus,
)
from transformers import ProcessorMixin, Qwen2VLProcessor

from disagg_ray.media.video import digest_pixels
from disagg_ray.models.family import Task
from disagg_ray.models.qwen_image import FAMILY
from disagg_ray.models.qwen_image.blocks import FILED, Denoiser, Stepper, TextEncoder, TextInput
from disagg_ray.models.qwen_image.edit_text import RESERVED
from disagg_ray.models.qwen_image.geometry import SEEN_PIXELS, seen_sides

PACKED = "packed_image_latents"
"""Latents of all images of a request as tokens, one image after the other, float32 (1, tokens, 4 x channels)."""
IMAGE_LATENTS = "image_latents"
"""The same in the transformer's precision, by the name that diffusers' loop has for it."""


class Processor(Qwen2VLProcessor):  # type: ignore[misc]
    """What stock hands texts and images to, without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_token, self.video_token = RESERVED
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(list(RESERVED))
        ProcessorMixin.__init__(self, image_processor, tokenizer)


class EditTextEncoder(TextEncoder):
    """Encodes each text with the images before it."""

    def __init__(self, task: Task) -> None:
        self._module, self._field = task.text, task.images[0]
        super().__init__()

    @property
    def text(self) -> Any:
        return FAMILY.part(self._module)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, ComponentSpec("processor", Qwen2VLProcessor), *_resizer()]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam(self._field, required=True)]

    def encoder(self, components: Any, state: Any) -> tuple[Hashable, Callable[[str], torch.Tensor]]:
        images = _listed(state.get(self._field))
        seen = [_resize(components, image, self.text.PIXELS) for image in images]
        return tuple(map(digest_pixels, images)), partial(self._encode_with, components, seen)

    def _encode_with(self, components: Any, images: list[Any], text: str) -> torch.Tensor:
        given = {
            "prompt_template_encode": self.text.TEMPLATE,
            "img_template_encode": self.text.PICTURE,
            "prompt_template_encode_start_idx": self.text.NUM_DROPPED,
            "device": components._execution_device,
        }
        processor = Processor(components.processor, components.tokenizer)
        made: torch.Tensor = get_qwen_prompt_embeds_edit_plus(
            components.text_encoder, processor, text, images, **given
        )[0]
        return made


class EncodeImages(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes latents of the request's images, each of its own size."""

    model_name = "qwenimage"

    def __init__(self, task: Task) -> None:
        self._field = task.images[0]
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            *QwenImageVaeEncoderStep().expected_components,
            *_resizer(),
            *QwenImageAfterDenoiseStep().expected_components,
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(self._field, required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(PACKED)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        packed = [self._encode(components, image) for image in _listed(state.get(self._field))]
        state.set(PACKED, torch.cat(packed, dim=1).float())
        return components, state

    def _encode(self, components: Any, image: Any) -> torch.Tensor:
        vae, seen = components.vae, _resize(components, image, SEEN_PIXELS)
        pixels = components.image_processor.preprocess(seen, seen.height, seen.width)
        place = {"device": components._execution_device, "dtype": vae.dtype}
        latents = encode_vae_image(pixels, vae, generator=None, **place, latent_channels=vae.config.z_dim)
        packed: torch.Tensor = components.pachifier.pack_latents(latents)
        return packed


class EditInput(TextInput):
    """Brings the images' latents to the transformer's precision."""

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam(PACKED, required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [*super().intermediate_outputs, OutputParam(IMAGE_LATENTS)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        components, state = super().__call__(components, state)
        state.set(IMAGE_LATENTS, state.get(PACKED).to(components.transformer.dtype))
        return components, state


class EditRopeInputs(ModularPipelineBlocks):  # type: ignore[misc]
    """Says how many rows and columns of tokens there are of what is made and of each image."""

    model_name = "qwenimage"

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(name, required=True) for name in ("height", "width", "request")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("img_shapes", kwargs_type=FILED)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        seen = [seen_sides(image.height, image.width) for image in state.get("request").images.values()]
        unit = 2 * components.vae_scale_factor
        shapes = [(1, high // unit, wide // unit) for high, wide in [(state.get("height"), state.get("width")), *seen]]
        state.set("img_shapes", [shapes], FILED)
        return components, state


class EditDenoise(QwenImageEditDenoiseStep):  # type: ignore[misc]
    """Denoises with the images' tokens beside those of what is made."""

    block_classes: ClassVar = [QwenImageEditLoopBeforeDenoiser, Denoiser, Stepper]


def _resizer() -> list[ComponentSpec]:
    return list(QwenImageEditProcessImagesInputStep().expected_components)


def _listed(given: Any) -> list[Any]:
    """Return the images of a field that holds one or several."""
    return given if isinstance(given, list) else [given]


def _resize(components: Any, image: Any, pixels: int) -> Any:
    """Resize an image to about that many pixels and keep its aspect."""
    processor: VaeImageProcessor = components.image_processor
    return processor.resize(image, *seen_sides(image.height, image.width, pixels))

"""Our own blocks, where diffusers' modular ones differ from its stock Qwen-Image pipeline.

Each takes the place of one block of diffusers 0.42 and computes exactly what `QwenImagePipeline` computes. A request
has one prompt, so its embeddings are as long as it is, without padding, and no mask goes with them: stock drops a mask
that hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.qwenimage.before_denoise import QwenImageRoPEInputsStep
from diffusers.modular_pipelines.qwenimage.decoders import QwenImageAfterDenoiseStep, QwenImageProcessImagesOutputStep
from diffusers.modular_pipelines.qwenimage.denoise import (
    QwenImageDenoiseStep,
    QwenImageLoopAfterDenoiser,
    QwenImageLoopBeforeDenoiser,
    QwenImageLoopDenoiser,
)
from diffusers.modular_pipelines.qwenimage.encoders import QwenImageTextEncoderStep, get_qwen_prompt_embeds

from disagg_ray.graph import FRAMES
from disagg_ray.models.blocks import KeepsTexts, SchedulerStep
from disagg_ray.models.prompts import check_length
from disagg_ray.models.qwen_image import text
from disagg_ray.models.qwen_image.text import NUM_DROPPED, TEMPLATE

EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
FILED = "denoiser_input_fields"
"""What diffusers' loop finds embeddings under."""


class TextEncoder(KeepsTexts, QwenImageTextEncoderStep):  # type: ignore[misc]
    """Encodes each text once, and refuses to truncate."""

    @property
    def text(self) -> Any:
        """Return the module that prepares a prompt."""
        return text

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam.template(name) for name in EMBEDS]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        most = state.get("max_sequence_length")
        texts = {"prompt": state.get("prompt")}
        if components.requires_unconditional_embeds:
            texts["negative_prompt"] = state.get("negative_prompt") or ""
        for field, asked in texts.items():
            check_length(field, components.tokenizer, self.text.prepare(asked), most, self.text.NUM_DROPPED)
        key, encode = self.encoder(components, state)
        for field, asked in texts.items():
            state.set(f"{field}_embeds", self.keep((asked, key), partial(encode, asked)), FILED)
        return components, state

    def encoder(self, components: Any, state: Any) -> tuple[Hashable, Callable[[str], torch.Tensor]]:
        """Return what encodes a text, and what beside the text decides what it makes."""
        most = state.get("max_sequence_length")
        return most, partial(self._encode, components, most)

    def _encode(self, components: Any, most: int, text: str) -> torch.Tensor:
        given = {"prompt_template_encode": TEMPLATE, "prompt_template_encode_start_idx": NUM_DROPPED}
        device = components._execution_device
        embeds, _ = get_qwen_prompt_embeds(components.text_encoder, components.tokenizer, text, **given, device=device)
        kept: torch.Tensor = embeds[:, :most]
        return kept


class TextInput(ModularPipelineBlocks):  # type: ignore[misc]
    """Brings embeddings to the transformer's precision, in which stock draws the first noise and steps."""

    model_name = "qwenimage"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [spec for spec in QwenImageLoopDenoiser().expected_components if spec.name == "transformer"]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam.template(name, required=name == EMBEDS[0]) for name in EMBEDS]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("dtype"), OutputParam("batch_size")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        dtype = components.transformer.dtype
        for name in EMBEDS:
            if (embeds := state.get(name)) is not None:
                state.set(name, embeds.to(dtype), FILED)
        state.set("dtype", dtype)
        state.set("batch_size", 1)
        return components, state


class RopeInputs(QwenImageRoPEInputsStep):  # type: ignore[misc]
    """Does without masks."""

    @property
    def inputs(self) -> list[InputParam]:
        return [param for param in super().inputs if not param.name.endswith("mask")]


class Denoiser(QwenImageLoopDenoiser):  # type: ignore[misc]
    """Predicts without masks, and without guidance leaves the prediction's norm as it is.

    What is predicted for tokens of a given image is dropped.
    """

    @property
    def inputs(self) -> list[InputParam]:
        return [param for param in super().inputs if param.name != "attention_kwargs"]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        guider, transformer = components.guider, components.transformer
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        texts = tuple(getattr(block_state, name, None) for name in EMBEDS)
        batches = guider.prepare_inputs({"encoder_hidden_states": texts})
        for batch in batches:
            guider.prepare_models(transformer)
            batch.noise_pred = transformer(
                hidden_states=block_state.latent_model_input,
                timestep=block_state.timestep / 1000,
                encoder_hidden_states=batch.encoder_hidden_states,
                img_shapes=block_state.img_shapes,
                attention_kwargs={},
                return_dict=False,
            )[0][:, : block_state.latents.shape[1]]
            guider.cleanup_models(transformer)
        guided = guider(batches)
        block_state.noise_pred = guided.pred
        if len(batches) > 1:
            length, wanted = (torch.norm(made, dim=-1, keepdim=True) for made in (guided.pred, guided.pred_cond))
            block_state.noise_pred = guided.pred * (wanted / length)
        return components, block_state


class Stepper(SchedulerStep, QwenImageLoopAfterDenoiser):  # type: ignore[misc]
    """Steps the scheduler of Qwen-Image."""


class Denoise(QwenImageDenoiseStep):  # type: ignore[misc]
    """Denoises with the blocks above."""

    block_classes: ClassVar = [QwenImageLoopBeforeDenoiser, Denoiser, Stepper]


class AfterDenoise(QwenImageAfterDenoiseStep):  # type: ignore[misc]
    """Unpacks latents, and hands them on in float32, which is exact: stock rounds them to the VAE's precision next."""

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        components, state = super().__call__(components, state)
        state.set("latents", state.get("latents").float())
        return components, state


class Postprocess(QwenImageProcessImagesOutputStep):  # type: ignore[misc]
    """Makes the image the only frame."""

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(FRAMES)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        made = components.image_processor.postprocess(state.get("images"), output_type="np")
        state.set(FRAMES, made[None])
        return components, state

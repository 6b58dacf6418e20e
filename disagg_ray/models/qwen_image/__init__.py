"""Qwen-Image: an image of a text; Qwen-Image-Edit: of a text and an image; its Plus models: of a text and images."""

from dataclasses import replace

from disagg_ray.models.family import Component, Family, Task, euler_scheduler, tokenizer
from disagg_ray.models.qwen_image.component_configs import (
    ProcessorConfig,
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
)

_EDIT = Task(
    images=("image",), frames_step=None, least_steps=2, step_caches=(), rounds_to=32, max_aspect=100, text="edit_text"
)

FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    tasks={
        "t2i": Task(frames_step=None, least_steps=2, step_caches=()),
        "edit": _EDIT,
        "edit_plus": replace(
            _EDIT,
            images=("reference_images",),
            sized_by="reference_images",
            max_references=4,  # stock has no limit; the models were made for three
            text="edit_plus_text",
        ),
    },
    pipelines=("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    components={
        "tokenizer": tokenizer("Qwen2Tokenizer"),
        "text_encoder": Component("transformers", ("Qwen2_5_VLForConditionalGeneration",)),
        "processor": Component(
            "transformers", ("Qwen2VLProcessor",), "preprocessor_config.json", ProcessorConfig, "AutoImageProcessor"
        ),
        "vae": Component("diffusers", ("AutoencoderKLQwenImage",), values=VaeConfig),
        "scheduler": euler_scheduler(SchedulerConfig),
        "transformer": Component("diffusers", ("QwenImageTransformer2DModel",), values=TransformerConfig),
    },
    shifts_by_size=True,
    without=(
        "model.flow_shift", "model.scheduler", "stages.parallel", "stages.denoiser.fuse", "stages.denoiser.loras",
        "stages.vae.compile",
    ),
)  # fmt: skip

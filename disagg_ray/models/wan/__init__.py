"""Wan 2.1 and 2.2: video of a text, of a text and a first frame, of a text, a first and a last
frame, or of a text, a control video and reference images."""

from dataclasses import replace

from disagg_ray.models.family import Component, Family, Task, tokenizer
from disagg_ray.models.wan.component_configs import (
    ImageEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    VaceTransformerConfig,
    VaeConfig,
)

_TRANSFORMER = Component(
    "diffusers", ("WanTransformer3DModel", "WanVACETransformer3DModel"), values=VaceTransformerConfig
)
_IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
_IMAGE_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")

MAX_ASPECT = 100
"""Of an image for CLIP, which enlarges its shorter side to 224 pixels before it cuts the longer one."""

FAMILY = Family(
    name="wan",
    title="Wan",
    tasks={
        "t2v": Task(step_caches=("first_block", "mag", "sea", "taylorseer")),
        "i2v": Task(images=("image",), max_aspect=MAX_ASPECT),
        "flf2v": Task(images=("image", "last_image"), least_frames=5, max_aspect=MAX_ASPECT),
        "ti2v": Task(optional_images=("image",), multiple=32),
        "vace": Task(
            optional_images=("video", "mask", "reference_images"),
            others=("conditioning_scale",),
            max_references=4,
            fits_references_of=8,
            step_caches=(),
            without=("stages.parallel.ulysses", "stages.parallel.shard_weights"),
        ),
    },
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    components={
        "tokenizer": tokenizer("T5Tokenizer"),
        "text_encoder": Component("transformers", ("UMT5EncoderModel",), values=TextEncoderConfig),
        "image_processor": Component("transformers", _IMAGE_PROCESSORS, "preprocessor_config.json"),
        "image_encoder": Component("transformers", _IMAGE_ENCODERS, values=ImageEncoderConfig),
        "vae": Component("diffusers", ("AutoencoderKLWan",), values=VaeConfig),
        "scheduler": Component("diffusers", (), "scheduler_config.json", SchedulerConfig),
        "transformer": _TRANSFORMER,
        "transformer_2": replace(_TRANSFORMER, dtype_of="transformer"),
    },
)

"""HunyuanVideo 1.5: video of a text, or of a text and a first frame."""

from disagg_ray.models.family import Component, Family, Task, euler_scheduler, tokenizer
from disagg_ray.models.hunyuan_video15.component_configs import (
    GuiderConfig,
    ImageEncoderConfig,
    QuotedEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)

_IMAGE_PROCESSORS = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")

FAMILY = Family(
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    tasks={
        "t2v": Task(step_caches=("taylorseer",)),
        "i2v": Task(images=("image",), max_aspect=100, crops_to=4, step_caches=("taylorseer",)),
    },
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    components={
        "tokenizer": tokenizer("Qwen2Tokenizer"),
        "text_encoder": Component("transformers", ("Qwen2_5_VLTextModel",), values=TextEncoderConfig),
        "tokenizer_2": Component("transformers", ("ByT5Tokenizer",), "tokenizer_config.json"),
        "text_encoder_2": Component(
            "transformers", ("T5EncoderModel",), values=QuotedEncoderConfig, dtype_of="text_encoder"
        ),
        "feature_extractor": Component("transformers", _IMAGE_PROCESSORS, "preprocessor_config.json"),
        "image_encoder": Component("transformers", ("SiglipVisionModel",), values=ImageEncoderConfig),
        "vae": Component("diffusers", ("AutoencoderKLHunyuanVideo15",), values=VaeConfig),
        "scheduler": euler_scheduler(SchedulerConfig),
        "transformer": Component("diffusers", ("HunyuanVideo15Transformer3DModel",), values=TransformerConfig),
        "guider": Component("diffusers", ("ClassifierFreeGuidance",), "guider_config.json", GuiderConfig),
    },
    without=("model.scheduler", "stages.parallel", "stages.denoiser.attention", "stages.denoiser.fuse"),
)

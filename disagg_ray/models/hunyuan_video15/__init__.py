"""HunyuanVideo 1.5: video of a text."""

from disagg_ray.models.family import Component, Family, Task, euler_scheduler, tokenizer
from disagg_ray.models.hunyuan_video15.component_configs import (
    GuiderConfig,
    QuotedEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)

FAMILY = Family(
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    tasks={"t2v": Task(step_caches=())},
    pipelines=("HunyuanVideo15Pipeline",),
    components={
        "tokenizer": tokenizer("Qwen2Tokenizer"),
        "text_encoder": Component("transformers", ("Qwen2_5_VLTextModel",), values=TextEncoderConfig),
        "tokenizer_2": Component("transformers", ("ByT5Tokenizer",), "tokenizer_config.json"),
        "text_encoder_2": Component(
            "transformers", ("T5EncoderModel",), values=QuotedEncoderConfig, dtype_of="text_encoder"
        ),
        "vae": Component("diffusers", ("AutoencoderKLHunyuanVideo15",), values=VaeConfig),
        "scheduler": euler_scheduler(SchedulerConfig),
        "transformer": Component("diffusers", ("HunyuanVideo15Transformer3DModel",), values=TransformerConfig),
        "guider": Component("diffusers", ("ClassifierFreeGuidance",), "guider_config.json", GuiderConfig),
    },
    without=(
        "model.scheduler", "stages.parallel", "stages.offload", "stages.denoiser.attention", "stages.denoiser.compile",
        "stages.denoiser.fuse", "stages.denoiser.loras", "stages.denoiser.quantization", "stages.vae.compile",
        "stages.vae.channels_last",
    ),
)  # fmt: skip

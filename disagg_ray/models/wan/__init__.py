"""Wan 2.1 and 2.2: video of a text, of a text and a first frame, or of a text, a first and a last frame."""

from disagg_ray.models.family import Component, Family, Task
from disagg_ray.models.wan.component_configs import (
    ImageEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)

_TRANSFORMER = Component("diffusers", ("WanTransformer3DModel",), values=TransformerConfig)
_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
_IMAGE_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")

FAMILY = Family(
    name="wan",
    title="Wan",
    tasks={
        "t2v": Task(step_caches=("first_block", "mag", "sea", "taylorseer")),
        "i2v": Task(images=("image",)),
        "flf2v": Task(images=("image", "last_image")),
        "ti2v": Task(optional_images=("image",), multiple=32),
    },
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    components={
        "tokenizer": Component("transformers", _TOKENIZERS, "tokenizer_config.json"),
        "text_encoder": Component("transformers", ("UMT5EncoderModel",), values=TextEncoderConfig),
        "image_processor": Component("transformers", _IMAGE_PROCESSORS, "preprocessor_config.json"),
        "image_encoder": Component("transformers", _IMAGE_ENCODERS, values=ImageEncoderConfig),
        "vae": Component("diffusers", ("AutoencoderKLWan",), values=VaeConfig),
        "scheduler": Component("diffusers", (), "scheduler_config.json", SchedulerConfig),
        "transformer": _TRANSFORMER,
        "transformer_2": _TRANSFORMER,
    },
)

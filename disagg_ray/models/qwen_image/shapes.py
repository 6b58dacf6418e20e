"""The shapes of Qwen-Image, published and tiny."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from disagg_ray.models.qwen_image.component_configs import (
    ProcessorConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)


@dataclass(frozen=True)
class Shape:
    """Component configurations of one model."""

    name: str
    text_encoder: TextEncoderConfig
    vae: VaeConfig
    transformer: TransformerConfig
    scheduler: SchedulerConfig
    pipeline: Literal["QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"] = "QwenImagePipeline"
    """Class of the stock diffusers pipeline."""
    processor: ProcessorConfig | None = None
    """What the text encoder sees of an image; None where the pipeline takes none."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the stock pipeline is given beside its components."""
        return {}


_TINY_TEXT = TextEncoderConfig(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(2, 3, 3),
    vision_depth=1,
    vision_hidden_size=32,
    vision_intermediate_size=64,
    vision_num_heads=2,
    mark_tokens=(259, 260, 261, 262),
)
_TINY_DIT = TransformerConfig(
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=_TINY_TEXT.hidden_size,
    axes_dims_rope=(4, 6, 6),
)

_PUBLISHED = Shape("qwen-image", TextEncoderConfig(), VaeConfig(), TransformerConfig(), SchedulerConfig())
_TINY = replace(
    _PUBLISHED,
    name="tiny-qwen-image",
    text_encoder=_TINY_TEXT,
    vae=VaeConfig(base_dim=4, num_res_blocks=1),
    transformer=_TINY_DIT,
)


def _edit(shape: Shape) -> Shape:
    """Return the shape of the model that edits images, of the same sizes."""
    return replace(shape, name=f"{shape.name}-edit", pipeline="QwenImageEditPipeline", processor=ProcessorConfig())


def _plus(shape: Shape) -> Shape:
    """Return the shape of the model that takes several images, `Qwen/Qwen-Image-Edit-2511`; 2509 lacks zero_cond_t."""
    transformer = replace(shape.transformer, zero_cond_t=True)
    edits = replace(shape, transformer=transformer, processor=ProcessorConfig())
    return replace(edits, name=f"{shape.name}-edit-plus", pipeline="QwenImageEditPlusPipeline")


SHAPES = {
    shape.name: shape for shape in (_PUBLISHED, _TINY, _edit(_PUBLISHED), _edit(_TINY), _plus(_PUBLISHED), _plus(_TINY))
}
"""Every shape by its name."""

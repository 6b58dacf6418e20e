"""The shapes of Qwen-Image, published and tiny."""

from dataclasses import dataclass
from typing import Any, Literal

from disagg_ray.models.qwen_image.component_configs import (
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
    pipeline: Literal["QwenImagePipeline"] = "QwenImagePipeline"
    """Class of the stock diffusers pipeline."""

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
)
_TINY_DIT = TransformerConfig(
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=_TINY_TEXT.hidden_size,
    axes_dims_rope=(4, 6, 6),
)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen-image", TextEncoderConfig(), VaeConfig(), TransformerConfig(), SchedulerConfig()),
        Shape("tiny-qwen-image", _TINY_TEXT, VaeConfig(base_dim=4, num_res_blocks=1), _TINY_DIT, SchedulerConfig()),
    )
}
"""Every shape by its name."""

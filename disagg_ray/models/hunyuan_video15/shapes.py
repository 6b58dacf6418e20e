"""The shapes of HunyuanVideo 1.5, published and tiny."""

from dataclasses import dataclass, replace
from typing import Any

from disagg_ray.models.hunyuan_video15.component_configs import (
    GuiderConfig,
    ImageEncoderConfig,
    QuotedEncoderConfig,
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
    text_encoder_2: QuotedEncoderConfig
    vae: VaeConfig
    transformer: TransformerConfig
    scheduler: SchedulerConfig
    guider: GuiderConfig
    image_encoder: ImageEncoderConfig | None = None
    """None where no image can be given."""

    @property
    def pipeline(self) -> str:
        """Class of the stock diffusers pipeline."""
        return "HunyuanVideo15Pipeline" if self.image_encoder is None else "HunyuanVideo15ImageToVideoPipeline"

    @property
    def settings(self) -> dict[str, Any]:
        """What the stock pipeline is given beside its components."""
        return {}


_TINY = Shape(
    "tiny-hunyuan-video15",
    TextEncoderConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    QuotedEncoderConfig(vocab_size=384, d_model=24, d_kv=16, d_ff=48, num_layers=2, num_heads=2),
    VaeConfig(latent_channels=8, block_out_channels=(8, 8, 16, 16, 32), layers_per_block=1),
    TransformerConfig(
        in_channels=17,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=24,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
    ),
    SchedulerConfig(),
    GuiderConfig(),
)

_PUBLISHED = Shape(
    "hunyuan-video-1.5", TextEncoderConfig(), QuotedEncoderConfig(), VaeConfig(), TransformerConfig(),
    SchedulerConfig(), GuiderConfig(),
)  # fmt: skip

_TINY_IMAGE = ImageEncoderConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def _of_image(shape: Shape, image_encoder: ImageEncoderConfig) -> Shape:
    """Return the model of a shape that takes an image."""
    transformer = replace(shape.transformer, task_type="i2v")
    return replace(shape, name=f"{shape.name}-i2v", transformer=transformer, image_encoder=image_encoder)


SHAPES = {
    shape.name: shape
    for shape in (_PUBLISHED, _of_image(_PUBLISHED, ImageEncoderConfig()), _TINY, _of_image(_TINY, _TINY_IMAGE))
}
"""Every shape by its name."""

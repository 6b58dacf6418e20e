"""The shapes of LTX-2, published and tiny."""

from dataclasses import dataclass
from typing import Any, Literal

from disagg_ray.models.ltx2.component_configs import (
    AudioVaeConfig,
    ConnectorsConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    VocoderConfig,
)


@dataclass(frozen=True)
class Shape:
    """Component configurations of one model."""

    name: str
    text_encoder: TextEncoderConfig
    connectors: ConnectorsConfig
    vae: VaeConfig
    audio_vae: AudioVaeConfig
    vocoder: VocoderConfig
    transformer: TransformerConfig
    scheduler: SchedulerConfig
    pipeline: Literal["LTX2Pipeline"] = "LTX2Pipeline"
    """Class of the stock diffusers pipeline."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the stock pipeline is given beside its components."""
        return {}


_TINY = Shape(
    "tiny-ltx2",
    TextEncoderConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        vision_num_hidden_layers=1,
        vision_hidden_size=32,
        vision_intermediate_size=64,
        vision_num_attention_heads=2,
        vision_image_size=224,
    ),
    ConnectorsConfig(
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
    ),
    VaeConfig(
        latent_channels=16,
        block_out_channels=(8, 16, 32, 32),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
    ),
    AudioVaeConfig(base_channels=16, num_res_blocks=1, latent_channels=4, mel_bins=16),
    VocoderConfig(in_channels=32, hidden_channels=64),
    TransformerConfig(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=16,
        audio_out_channels=16,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
    ),
    SchedulerConfig(),
)

_PUBLISHED = Shape(
    "ltx-2", TextEncoderConfig(), ConnectorsConfig(), VaeConfig(), AudioVaeConfig(), VocoderConfig(),
    TransformerConfig(), SchedulerConfig(),
)  # fmt: skip

SHAPES = {shape.name: shape for shape in (_PUBLISHED, _TINY)}
"""Every shape by its name."""

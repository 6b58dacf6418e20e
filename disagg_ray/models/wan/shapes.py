"""The shapes of the Wan models, published and tiny: which components each has, and their configurations."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from disagg_ray.models.wan.component_configs import (
    WAN22_VAE,
    ImageEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaceTransformerConfig,
    VaeConfig,
)
from disagg_ray.text import did_you_mean

Pipeline = Literal["WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"]


@dataclass(frozen=True)
class Shape:
    """Component configurations of one model."""

    name: str
    """Name in this table."""
    pipeline: Pipeline
    """Class of the stock diffusers pipeline."""
    text_encoder: TextEncoderConfig
    """UMT5 encoder."""
    vae: VaeConfig
    """Encoder and decoder between frames and latents."""
    transformer: TransformerConfig
    """The only transformer, or the one for high noise."""
    scheduler: SchedulerConfig
    """Scheduler as the checkpoint saves it; a request makes its own."""
    image_encoder: ImageEncoderConfig | None = None
    """CLIP encoder; None where the transformer takes no image embeddings."""
    transformer_2: TransformerConfig | None = None
    """The transformer for low noise; None where there is only one."""
    boundary_ratio: float | None = None
    """Share of the training timesteps below which `transformer_2` takes over; None where there is only one."""
    expand_timesteps: bool = False
    """Whether each token has a timestep of its own (TI2V), so that a first frame can be given to the same model."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the stock pipeline is given beside its components."""
        expands = {} if self.pipeline == "WanVACEPipeline" else {"expand_timesteps": self.expand_timesteps}
        return {"boundary_ratio": self.boundary_ratio} | expands

    @property
    def takes_image(self) -> bool:
        """Whether a request needs a first frame."""
        return self.pipeline == "WanImageToVideoPipeline"

    @property
    def takes_last_image(self) -> bool:
        """Whether a request needs a last frame."""
        return self.transformer.pos_embed_seq_len is not None


def get_shape(name: str) -> Shape:
    """Return the shape of that name.

    Raises:
        ValueError: no shape has this name; names the nearest.
    """
    if name in SHAPES:
        return SHAPES[name]
    raise ValueError(f"no model shape {name!r}; known: {', '.join(SHAPES)}{did_you_mean(name, SHAPES, cutoff=0)}")


_UMT5_XXL = TextEncoderConfig()
_CLIP_VIT_H = ImageEncoderConfig()
_VAE = VaeConfig()
_T2V_14B = TransformerConfig()
_T2V_1_3B = replace(_T2V_14B, num_attention_heads=12, num_layers=30, ffn_dim=8960)
_I2V_A14B = replace(_T2V_14B, in_channels=36)
_I2V_14B = replace(_I2V_A14B, image_dim=1280, added_kv_proj_dim=5120)
_FLF2V_14B = replace(_I2V_14B, pos_embed_seq_len=514)
_TI2V_5B = replace(_T2V_14B, num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
_VACE_14B = VaceTransformerConfig()
_VACE_1_3B = VaceTransformerConfig(
    num_attention_heads=12, num_layers=30, ffn_dim=8960, vace_layers=tuple(range(0, 30, 2))
)


def _image_shape(name: str, transformer: TransformerConfig, flow_shift: float) -> Shape:
    """Return a Wan 2.1 model that takes an image."""
    scheduler = SchedulerConfig(flow_shift)
    return Shape(name, "WanImageToVideoPipeline", _UMT5_XXL, _VAE, transformer, scheduler, _CLIP_VIT_H)


def _two_transformers(name: str, pipeline: Pipeline, transformer: TransformerConfig, boundary_ratio: float) -> Shape:
    """Return a Wan 2.2 model: transformers of one shape for high and for low noise."""
    return Shape(name, pipeline, _UMT5_XXL, _VAE, transformer, SchedulerConfig(), None, transformer, boundary_ratio)


_PUBLISHED = (
    Shape("wan2.1-t2v-1.3b", "WanPipeline", _UMT5_XXL, _VAE, _T2V_1_3B, SchedulerConfig()),
    Shape("wan2.1-t2v-14b", "WanPipeline", _UMT5_XXL, _VAE, _T2V_14B, SchedulerConfig()),
    _image_shape("wan2.1-i2v-14b-480p", _I2V_14B, flow_shift=3.0),
    _image_shape("wan2.1-i2v-14b-720p", _I2V_14B, flow_shift=5.0),
    _image_shape("wan2.1-flf2v-14b-720p", _FLF2V_14B, flow_shift=16.0),
    _two_transformers("wan2.2-t2v-a14b", "WanPipeline", _T2V_14B, boundary_ratio=0.875),
    _two_transformers("wan2.2-i2v-a14b", "WanImageToVideoPipeline", _I2V_A14B, boundary_ratio=0.9),
    Shape("wan2.2-ti2v-5b", "WanPipeline", _UMT5_XXL, WAN22_VAE, _TI2V_5B, SchedulerConfig(5.0), expand_timesteps=True),
    Shape("wan2.1-vace-1.3b", "WanVACEPipeline", _UMT5_XXL, _VAE, _VACE_1_3B, SchedulerConfig()),
    Shape("wan2.1-vace-14b", "WanVACEPipeline", _UMT5_XXL, _VAE, _VACE_14B, SchedulerConfig()),
)

_TINY_TEXT = TextEncoderConfig(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
_TINY_IMAGE = ImageEncoderConfig(
    hidden_size=32,
    intermediate_size=64,
    projection_dim=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
_TINY_DIT = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96, text_dim=_TINY_TEXT.d_model, freq_dim=64
)
_TINY_A14B_I2V_DIT = replace(_TINY_DIT, in_channels=36)
_TINY_I2V_DIT = replace(_TINY_A14B_I2V_DIT, image_dim=_TINY_IMAGE.hidden_size, added_kv_proj_dim=48)
_TINY_FLF2V_DIT = replace(_TINY_I2V_DIT, pos_embed_seq_len=2 * _TINY_IMAGE.num_tokens)
_TINY_VACE_DIT = VaceTransformerConfig(**{**vars(_TINY_DIT), "num_layers": 3}, vace_layers=(0, 2))


def _tiny(published: str, name: str, transformer: TransformerConfig) -> Shape:
    """A published shape in tiny widths: the same components, scheduler and boundary."""
    shape = next(shape for shape in _PUBLISHED if shape.name == published)
    return replace(
        shape,
        name=name,
        text_encoder=_TINY_TEXT,
        vae=replace(shape.vae, base_dim=4, num_res_blocks=1, decoder_base_dim=shape.vae.decoder_base_dim and 6),
        transformer=transformer,
        image_encoder=_TINY_IMAGE if shape.image_encoder else None,
        transformer_2=transformer if shape.transformer_2 else None,
    )


_TINY = (
    _tiny("wan2.1-t2v-1.3b", "tiny-t2v", _TINY_DIT),
    _tiny("wan2.1-i2v-14b-480p", "tiny-i2v", _TINY_I2V_DIT),
    _tiny("wan2.1-flf2v-14b-720p", "tiny-flf2v", _TINY_FLF2V_DIT),
    _tiny("wan2.2-t2v-a14b", "tiny-a14b-t2v", _TINY_DIT),
    _tiny("wan2.2-i2v-a14b", "tiny-a14b-i2v", _TINY_A14B_I2V_DIT),
    _tiny("wan2.2-ti2v-5b", "tiny-ti2v", replace(_TINY_DIT, in_channels=48, out_channels=48)),
    _tiny("wan2.1-vace-1.3b", "tiny-vace", _TINY_VACE_DIT),
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in (*_PUBLISHED, *_TINY)}
"""Every shape by its name."""

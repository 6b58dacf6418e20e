"""The shapes of the Wan models, published and tiny, as plain data.

Field names are those of the component configurations of diffusers and transformers, so that a configuration here is
the keyword arguments there. Numbers of the published shapes: `scripts/convert_wan_to_diffusers.py` of diffusers,
`google/umt5-xxl` and `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from disagg_ray.text import did_you_mean

Pipeline = Literal["WanPipeline", "WanImageToVideoPipeline"]


@dataclass(frozen=True)
class TextEncoderConfig:
    """UMT5 encoder; the defaults are UMT5-XXL."""

    vocab_size: int = 256384
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    d_model: int = 4096
    """Width, which is the transformer's `text_dim`."""
    d_kv: int = 64
    """Width of one attention head."""
    d_ff: int = 10240
    """Inner width of the feed-forward layers."""
    num_layers: int = 24
    """Encoder layers."""
    num_heads: int = 64
    """Attention heads."""
    relative_attention_num_buckets: int = 32
    """Buckets of relative positions, in every layer."""
    relative_attention_max_distance: int = 128
    """Positions farther apart, in tokens, share the last bucket."""
    feed_forward_proj: str = "gated-gelu"
    """Kind of feed-forward layer."""
    layer_norm_epsilon: float = 1e-6
    """Added to the variance in the norms."""
    dropout_rate: float = 0.1
    """Used in training only."""
    pad_token_id: int = 0
    """Token that fills a prompt up to its full length."""
    eos_token_id: int = 1
    """Token that ends a prompt."""


@dataclass(frozen=True)
class ImageEncoderConfig:
    """CLIP vision encoder; the defaults are ViT-H/14."""

    hidden_size: int = 1280
    """Width, which is the transformer's `image_dim`."""
    intermediate_size: int = 5120
    """Inner width of the feed-forward layers."""
    projection_dim: int = 1024
    """Width that CLIP shares with its text encoder; unused here."""
    num_hidden_layers: int = 32
    """Layers; the last but one gives the image embeddings."""
    num_attention_heads: int = 16
    """Attention heads."""
    image_size: int = 224
    """Pixels a side of the image it sees."""
    patch_size: int = 14
    """Pixels a side of one patch."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward layers."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in the norms."""

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: its patches and the class token."""
        patches_a_side: int = self.image_size // self.patch_size
        return patches_a_side * patches_a_side + 1


@dataclass(frozen=True)
class VaeConfig:
    """Wan 2.1 VAE, which Wan 2.2 A14B uses too; the defaults are the published ones."""

    base_dim: int = 96
    """Width at full resolution."""
    z_dim: int = 16
    """Channels of the latents."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width at each resolution, as multiples of `base_dim`."""
    num_res_blocks: int = 2
    """Residual blocks at each resolution."""
    attn_scales: tuple[float, ...] = ()
    """Scales at which blocks attend; the middle block always does."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """Whether each halving of the resolution halves the frames too (the name is spelt as in diffusers)."""
    dropout: float = 0.0
    """Used in training only."""
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    """Mean of each latent channel."""
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    """Standard deviation of each latent channel."""
    # fmt: on


@dataclass(frozen=True)
class TransformerConfig:
    """Wan diffusion transformer; the defaults are the 14B text-to-video one."""

    num_attention_heads: int = 40
    """Attention heads."""
    attention_head_dim: int = 128
    """Width of one attention head."""
    num_layers: int = 40
    """Blocks."""
    ffn_dim: int = 13824
    """Inner width of the feed-forward layers."""
    in_channels: int = 16
    """Channels in: 16 of latents, and for an image 4 of mask and 16 of its latents."""
    out_channels: int = 16
    """Channels out: those of the latents."""
    text_dim: int = 4096
    """Width of the prompt embeddings."""
    freq_dim: int = 256
    """Width of the sinusoids that encode the timestep."""
    image_dim: int | None = None
    """Width of the image embeddings; None where the model takes none."""
    added_kv_proj_dim: int | None = None
    """Width of the keys and values made of image embeddings; None where the model takes none."""
    pos_embed_seq_len: int | None = None
    """Image tokens of a first and a last frame together; None where the model knows no last frame."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    cross_attn_norm: bool = True
    """Whether cross-attention normalises its input."""
    qk_norm: str = "rms_norm_across_heads"
    """Norm of queries and keys."""
    eps: float = 1e-6
    """Added to the variance in the norms."""
    rope_max_seq_len: int = 1024
    """Longest side, in tokens, that the rotary position embedding knows."""


@dataclass(frozen=True)
class SchedulerConfig:
    """UniPC multistep scheduler on flow sigmas; the defaults are the published ones."""

    flow_shift: float = 3.0
    """Shift of the sigmas towards noise."""
    prediction_type: str = "flow_prediction"
    """What the transformer predicts."""
    use_flow_sigmas: bool = True
    """Whether sigmas are those of flow matching."""
    num_train_timesteps: int = 1000
    """Timesteps of training."""


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
_TINY_VAE = VaeConfig(base_dim=4, num_res_blocks=1)
_TINY_DIT = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96, text_dim=_TINY_TEXT.d_model, freq_dim=64
)
_TINY_A14B_I2V_DIT = replace(_TINY_DIT, in_channels=36)
_TINY_I2V_DIT = replace(_TINY_A14B_I2V_DIT, image_dim=_TINY_IMAGE.hidden_size, added_kv_proj_dim=48)
_TINY_FLF2V_DIT = replace(_TINY_I2V_DIT, pos_embed_seq_len=2 * _TINY_IMAGE.num_tokens)


def _tiny(published: str, name: str, transformer: TransformerConfig) -> Shape:
    """A published shape in tiny widths: the same components, scheduler and boundary."""
    shape = next(shape for shape in _PUBLISHED if shape.name == published)
    return replace(
        shape,
        name=name,
        text_encoder=_TINY_TEXT,
        vae=_TINY_VAE,
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
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in (*_PUBLISHED, *_TINY)}
"""Every shape by its name."""

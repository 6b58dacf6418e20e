"""Configurations of a Wan model's components, as plain data.

Field names are those of the component configurations of diffusers and transformers, so that a configuration here is
the keyword arguments there. Numbers of the published models: `scripts/convert_wan_to_diffusers.py` of diffusers,
`google/umt5-xxl`, `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`,
`transformer/config.json` of `Wan-AI/Wan2.1-VACE-1.3B-diffusers` and `Wan-AI/Wan2.1-VACE-14B-diffusers`, and
`vae/config.json` of `Wan-AI/Wan2.2-TI2V-5B-Diffusers`.
"""

from dataclasses import dataclass


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
    decoder_base_dim: int | None = None
    """`base_dim` of the decoder; None: the same."""
    is_residual: bool = False
    """Whether each resolution has a shortcut that averages or repeats."""
    in_channels: int = 3
    """Channels in: three colours of each pixel of a patch."""
    out_channels: int = 3
    """Channels out, alike."""
    patch_size: int | None = None
    """Pixels a side of a patch that is one position of the network; None: 1."""
    scale_factor_temporal: int = 4
    """Frames a latent spans."""
    scale_factor_spatial: int = 8
    """Pixels a latent spans, in height and in width."""
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
class VaceTransformerConfig(TransformerConfig):
    """Wan VACE's, with a second row of blocks for the control; the defaults are the 14B one."""

    vace_layers: tuple[int, ...] = (0, 5, 10, 15, 20, 25, 30, 35)
    """Blocks whose output gets that of a control block added."""
    vace_in_channels: int = 96
    """Channels of the control: latents of what stays and of what is made, and the mask's 8 x 8 pixels."""


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


# fmt: off
WAN22_VAE = VaeConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)
# fmt: on
"""The VAE of Wan 2.2 TI2V-5B."""

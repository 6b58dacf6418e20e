"""Configurations of a Qwen-Image model's components, as plain data, by the names of diffusers and transformers.

Defaults are the published model's, `Qwen/Qwen-Image` and `Qwen/Qwen2.5-VL-7B-Instruct`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextEncoderConfig:
    """Qwen2.5-VL; its vision half sees the image that is edited, if there is one."""

    vocab_size: int = 152064
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    hidden_size: int = 3584
    """Width, which is the transformer's `joint_attention_dim`."""
    intermediate_size: int = 18944
    """Inner width of the feed-forward layers."""
    num_hidden_layers: int = 28
    """Layers."""
    num_attention_heads: int = 28
    """Attention heads."""
    num_key_value_heads: int = 4
    """Heads of keys and values."""
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    """Half widths of a head that are rotated by time, row and column."""
    vision_depth: int = 32
    """Layers of the vision half."""
    vision_hidden_size: int = 1280
    """Width of the vision half."""
    vision_intermediate_size: int = 3420
    """Inner width of its feed-forward layers."""
    vision_num_heads: int = 16
    """Its attention heads."""
    mark_tokens: tuple[int, int, int, int] = (151655, 151656, 151652, 151653)
    """Tokens in place of an image and of a video, and before and after them."""


@dataclass(frozen=True)
class ProcessorConfig:
    """What the text encoder sees of an image: patches, four of which make a token."""

    patch_size: int = 14
    """Rows and columns of pixels in a patch."""
    temporal_patch_size: int = 2
    """Frames in a patch: the image is repeated."""
    merge_size: int = 2
    """Rows and columns of patches in a token."""


@dataclass(frozen=True)
class VaeConfig:
    """Autoencoder of one frame."""

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
    """Transformer of two streams, text and image."""

    patch_size: int = 2
    """Rows and columns of latents in one token."""
    in_channels: int = 64
    """Channels of a token: those of its latents."""
    out_channels: int = 16
    """Channels of one latent."""
    num_layers: int = 60
    """Blocks."""
    attention_head_dim: int = 128
    """Width of one attention head."""
    num_attention_heads: int = 24
    """Attention heads."""
    joint_attention_dim: int = 3584
    """Width of the prompt embeddings."""
    guidance_embeds: bool = False
    """Whether it takes the scale of guidance as an input."""
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    """Widths of a head that are rotated by time, row and column."""
    zero_cond_t: bool = False
    """Whether tokens of given images count as free of noise, at timestep 0."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Euler steps of flow matching, shifted by the number of image tokens."""

    base_image_seq_len: int = 256
    """Tokens of an image that is shifted by `base_shift`."""
    base_shift: float = 0.5
    """Logarithm of that shift."""
    max_image_seq_len: int = 8192
    """Tokens of an image that is shifted by `max_shift`."""
    max_shift: float = 0.9
    """Logarithm of that shift."""
    num_train_timesteps: int = 1000
    """Timesteps of training."""
    shift: float = 1.0
    """Shift of all sizes; unused."""
    shift_terminal: float | None = 0.02
    """Noise level of the last step."""
    time_shift_type: str = "exponential"
    """Whether the shift is given as its logarithm."""
    use_dynamic_shifting: bool = True
    """Whether the shift follows from the size."""

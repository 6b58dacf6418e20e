"""Configurations of a HunyuanVideo 1.5 model's components, as plain data, by the names of diffusers and transformers.

Defaults are those of the classes of diffusers, and of `Qwen/Qwen2.5-VL-7B-Instruct`, `google/byt5-small` and
`google/siglip-so400m-patch14-384`, which the encoders are. A folder's own files decide: these serve for checkpoints of
random weights, and for the types of what a file may say.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextEncoderConfig:
    """Text half of Qwen2.5-VL."""

    vocab_size: int = 152064
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    hidden_size: int = 3584
    """Width, which is the transformer's `text_embed_dim`."""
    intermediate_size: int = 18944
    """Inner width of the feed-forward layers."""
    num_hidden_layers: int = 28
    """Layers; the last two make nothing that is used."""
    num_attention_heads: int = 28
    """Attention heads."""
    num_key_value_heads: int = 4
    """Heads of keys and values."""


@dataclass(frozen=True)
class QuotedEncoderConfig:
    """ByT5, which encodes the texts in quotes: those that are to be seen in the video."""

    vocab_size: int = 1510
    """Rows of the embedding: bytes, and marks of colours and fonts."""
    d_model: int = 1472
    """Width, which is the transformer's `text_embed_2_dim`."""
    d_kv: int = 64
    """Width of one attention head."""
    d_ff: int = 3584
    """Inner width of the feed-forward layers."""
    num_layers: int = 12
    """Layers."""
    num_heads: int = 6
    """Attention heads."""
    feed_forward_proj: str = "gated-gelu"
    """Kind of the feed-forward layers."""


@dataclass(frozen=True)
class ImageEncoderConfig:
    """SigLIP vision encoder."""

    hidden_size: int = 1152
    """Width, which is the transformer's `image_embed_dim`."""
    intermediate_size: int = 4304
    """Inner width of the feed-forward layers."""
    num_hidden_layers: int = 27
    """Layers."""
    num_attention_heads: int = 16
    """Attention heads."""
    image_size: int = 384
    """Pixels a side of the image it sees."""
    patch_size: int = 14
    """Pixels a side of one patch."""


@dataclass(frozen=True)
class TransformerConfig:
    """Transformer of two streams, video and text."""

    in_channels: int = 65
    """Latents, latents of a given image, and a mask of it: the latter two are zeros where there is none."""
    out_channels: int = 32
    """Channels of the latents."""
    num_attention_heads: int = 16
    """Attention heads."""
    attention_head_dim: int = 128
    """Width of each."""
    num_layers: int = 54
    """Blocks."""
    num_refiner_layers: int = 2
    """Blocks that the text passes first."""
    patch_size: int = 1
    """Rows and columns of latents in one token."""
    patch_size_t: int = 1
    """Frames of latents in one token."""
    text_embed_dim: int = 3584
    """Width of text embeddings."""
    text_embed_2_dim: int = 1472
    """Width of embeddings of quoted texts."""
    image_embed_dim: int = 1152
    """Width of embeddings of a given image."""
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    """Widths of a head that are rotated by time, row and column."""
    target_size: int = 640
    """Pixels of a side of a square of the size that it was trained for."""
    task_type: str = "t2v"
    """What it was trained for."""
    use_meanflow: bool = False
    """Whether it was distilled to few steps."""


@dataclass(frozen=True)
class VaeConfig:
    """Autoencoder of video."""

    latent_channels: int = 32
    """Channels of the latents."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    """Width at each resolution."""
    layers_per_block: int = 2
    """Layers at each resolution."""
    spatial_compression_ratio: int = 16
    """Pixels that a latent spans."""
    temporal_compression_ratio: int = 4
    """Frames that a latent spans."""
    scaling_factor: float = 1.03682
    """What latents are multiplied with."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Euler steps of flow matching."""

    num_train_timesteps: int = 1000
    """Timesteps of training."""
    shift: float = 5.0
    """Shift of all sizes."""
    use_dynamic_shifting: bool = False
    """Whether the shift follows from the size."""


@dataclass(frozen=True)
class GuiderConfig:
    """Guidance of the stock pipeline; a request's scale is in place of this one."""

    guidance_scale: float = 6.0
    """Scale."""
    guidance_rescale: float = 0.0
    """Share in which the prediction's spread is brought to that with the prompt."""
    use_original_formulation: bool = False
    """Whether guidance starts from the prediction with the prompt."""
    start: float = 0.0
    """Share of the steps before which there is none."""
    stop: float = 1.0
    """Share of the steps after which there is none."""

"""Configurations of an LTX-2 model's components, as plain data, by the names of diffusers and transformers.

Defaults are those of `Lightricks/LTX-2` and its text encoder, Gemma 3 12B, as diffusers' conversion script and the
classes' own defaults have them. `rope_type` is as SGLang's configuration of LTX-2 says. A folder's own files decide:
these serve for checkpoints of random weights, and for the types of what a file may say.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextEncoderConfig:
    """Gemma 3; its vision half is part of the checkpoint, and sees nothing here."""

    vocab_size: int = 262208
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    hidden_size: int = 3840
    """Width, which is the connectors' `caption_channels`."""
    intermediate_size: int = 15360
    """Inner width of the feed-forward layers."""
    num_hidden_layers: int = 48
    """Layers."""
    num_attention_heads: int = 16
    """Attention heads."""
    num_key_value_heads: int = 8
    """Heads of keys and values."""
    head_dim: int = 256
    """Width of one attention head."""
    sliding_window: int = 1024
    """Tokens that most layers attend to."""
    vision_num_hidden_layers: int = 27
    """Layers of the vision half."""
    vision_hidden_size: int = 1152
    """Width of the vision half."""
    vision_intermediate_size: int = 4304
    """Inner width of its feed-forward layers."""
    vision_num_attention_heads: int = 16
    """Its attention heads."""
    vision_image_size: int = 896
    """Pixels of a side of an image."""
    vision_patch_size: int = 14
    """Pixels of a side of one of its tokens."""


@dataclass(frozen=True)
class ConnectorsConfig:
    """Make embeddings for video and for sound of all layers of the text encoder."""

    caption_channels: int = 3840
    """Width of the text encoder."""
    text_proj_in_factor: int = 49
    """Layers of the text encoder, and its embedding."""
    video_connector_num_attention_heads: int = 30
    """Attention heads of the one for video."""
    video_connector_attention_head_dim: int = 128
    """Width of each."""
    video_connector_num_layers: int = 2
    """Layers."""
    video_connector_num_learnable_registers: int | None = 128
    """Learnt tokens in place of padding; the number of tokens is a multiple of it."""
    audio_connector_num_attention_heads: int = 30
    """Attention heads of the one for sound."""
    audio_connector_attention_head_dim: int = 128
    """Width of each."""
    audio_connector_num_layers: int = 2
    """Layers."""
    audio_connector_num_learnable_registers: int | None = 128
    """As for video."""
    rope_type: str = "split"
    """How halves of a head are paired."""
    per_modality_projections: bool = False
    """Of LTX-2.3."""


@dataclass(frozen=True)
class TransformerConfig:
    """Transformer of two streams, video and sound."""

    in_channels: int = 128
    """Channels of a latent of video."""
    out_channels: int = 128
    """The same."""
    patch_size: int = 1
    """Rows and columns of latents in one token."""
    patch_size_t: int = 1
    """Frames of latents in one token."""
    num_attention_heads: int = 32
    """Attention heads of the stream of video."""
    attention_head_dim: int = 128
    """Width of each."""
    cross_attention_dim: int = 4096
    """Width of text embeddings, once projected: that of the stream."""
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)
    """Frames, rows and columns that a latent spans."""
    audio_in_channels: int = 128
    """Channels of a latent of sound, all its bins together."""
    audio_out_channels: int = 128
    """The same."""
    audio_num_attention_heads: int = 32
    """Attention heads of the stream of sound."""
    audio_attention_head_dim: int = 64
    """Width of each."""
    audio_cross_attention_dim: int = 2048
    """Width of the stream of sound."""
    audio_scale_factor: int = 4
    """Frames of a spectrogram that a latent spans."""
    audio_sampling_rate: int = 16000
    """Samples a second of the sound that spectrograms are of."""
    audio_hop_length: int = 160
    """Samples between frames of a spectrogram."""
    num_layers: int = 48
    """Blocks."""
    caption_channels: int = 3840
    """Width of the connectors' embeddings."""
    rope_type: str = "split"
    """How halves of a head are paired."""
    gated_attn: bool = False
    """Of LTX-2.3."""
    cross_attn_mod: bool = False
    """Of LTX-2.3."""


@dataclass(frozen=True)
class VaeConfig:
    """Autoencoder of video."""

    latent_channels: int = 128
    """Channels of the latents."""
    block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    """Widths of the encoder."""
    decoder_block_out_channels: tuple[int, ...] = (256, 512, 1024)
    """Widths of the decoder."""
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    """Layers of each block of the encoder."""
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    """Layers of each block of the decoder."""
    decoder_causal: bool = False
    """Whether a frame depends on those before it alone."""
    timestep_conditioning: bool = False
    """Whether the decoder takes noise and its level."""
    patch_size: int = 4
    """Rows and columns of pixels that are channels first."""
    patch_size_t: int = 1
    """Frames likewise."""
    spatial_compression_ratio: int = 32
    """Pixels that a latent spans."""
    temporal_compression_ratio: int = 8
    """Frames that a latent spans."""


@dataclass(frozen=True)
class AudioVaeConfig:
    """Autoencoder of spectrograms."""

    base_channels: int = 128
    """Width at full resolution; also the channels of a latent with all its bins."""
    output_channels: int = 2
    """Channels of the sound."""
    in_channels: int = 2
    """The same."""
    ch_mult: tuple[int, ...] = (1, 2, 4)
    """Widths at each resolution, as multiples of the first."""
    num_res_blocks: int = 2
    """Residual blocks at each resolution."""
    latent_channels: int = 8
    """Channels of the latents."""
    sample_rate: int = 16000
    """Samples a second of the sound that spectrograms are of."""
    mel_hop_length: int = 160
    """Samples between frames of a spectrogram."""
    mel_bins: int = 64
    """Bins of a spectrogram."""


@dataclass(frozen=True)
class VocoderConfig:
    """Makes samples of a spectrogram."""

    in_channels: int = 128
    """Bins of a spectrogram, of all channels."""
    hidden_channels: int = 1024
    """Width before the first upsampling."""
    out_channels: int = 2
    """Channels of the sound."""
    upsample_kernel_sizes: tuple[int, ...] = (16, 15, 8, 4, 4)
    """Of each upsampling."""
    upsample_factors: tuple[int, ...] = (6, 5, 2, 2, 2)
    """Their product is the samples of a frame of a spectrogram."""
    resnet_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    """Of the residual blocks after each."""
    output_sampling_rate: int = 24000
    """Samples a second that it makes."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Euler steps of flow matching, shifted by the number of tokens of video."""

    base_image_seq_len: int = 1024
    """Tokens of a video that is shifted by `base_shift`."""
    base_shift: float = 0.95
    """Logarithm of that shift."""
    max_image_seq_len: int = 4096
    """Tokens of a video that is shifted by `max_shift`."""
    max_shift: float = 2.05
    """Logarithm of that shift."""
    num_train_timesteps: int = 1000
    """Timesteps of training."""
    shift: float = 1.0
    """Shift of all sizes; unused."""
    shift_terminal: float | None = 0.1
    """Noise level of the last step."""
    time_shift_type: str = "exponential"
    """Whether the shift is given as its logarithm."""
    use_dynamic_shifting: bool = True
    """Whether the shift follows from the size."""

"""The tiny Wan: the real architecture with small numbers, how it starts to learn, and how it is written to a folder.

Everything here is stock diffusers and transformers. Ours are the sizes, an initialisation that learns fast, and a pass
of the VAE over a whole clip at once: equal to the stock pass, which goes frame chunk by frame chunk, in a fifth of the
kernels.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

MAX_SEQUENCE_LENGTH = 32  # tokens; padding is attended to, and a long one drowns the words
FLOW_SHIFT = 3.0
IMAGE_SIZE = 64  # pixels that the image encoder sees, both sides
LATENT_CHANNELS = 16
TEXT_DIM = 128
IMAGE_DIM = 96
SILU_GAIN = 1.7  # 1 / rms of SiLU on a unit normal

torch._dynamo.config.recompile_limit = 64  # one kernel for each width and layout that `_norm_silu` meets


def build_tokenizer(captions: Iterable[str]) -> Any:
    """A word-level tokenizer that knows every word of the captions."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for caption in captions for word, _ in splitter.pre_tokenize_str(caption)} | {".", "grey"})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocab_size: int) -> Any:
    """Two layers of UMT5."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_image_encoder() -> Any:
    """17 tokens of a 64x64 image. The last of its two layers is never used: Wan takes the hidden state before it."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=2 * IMAGE_DIM,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=16,
        )
    )


def build_image_processor() -> Any:
    return CLIPImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)


def build_vae() -> Any:
    """A narrow encoder and a decoder twice as wide: reading flat shapes is easier than drawing them.

    Its latents' mean and standard deviation are None until they are measured."""
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=16, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=1
    )
    vae.register_to_config(latents_mean=None, latents_std=None)
    initialise_vae(vae)
    return vae


def build_transformer(*, with_image: bool) -> Any:
    """T2V: 16 channels in. I2V: 36 (noise, mask, first frame), and image tokens that stand before the text tokens.

    `added_kv_proj_dim` stays None: with it, stock attention takes the last 512 tokens for text whatever
    `max_sequence_length` is, and would misread 32."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=36 if with_image else LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        image_dim=IMAGE_DIM if with_image else None,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in model.blocks:  # queries and keys that know a position before they know a content
        nn.init.normal_(block.attn1.to_q.bias)
        nn.init.normal_(block.attn1.to_k.bias)
    return model


def widen_for_image(text_only: Any) -> Any:
    """An I2V transformer that starts as a T2V one: it ignores the 20 added channels until it learns to use them."""
    model = build_transformer(with_image=True)
    patch = torch.zeros_like(model.patch_embedding.weight)
    patch[:, :LATENT_CHANNELS] = text_only.patch_embedding.weight.detach()
    model.load_state_dict(model.state_dict() | text_only.state_dict() | {"patch_embedding.weight": patch})
    return model


@torch.no_grad()
def initialise_vae(vae: Any) -> None:
    """Variance-preserving, and still: every 3x3x3 kernel begins as a 3x3 one of the present frame, resampling in time
    as repetition, residual branches faint, and the posterior narrow."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            present = module.weight[:, :, -1] if isinstance(module, nn.Conv3d) else module.weight
            module.weight.zero_()
            present.normal_(std=present[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight
            weight.zero_()
            weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
        elif isinstance(module, WanResidualBlock):
            module.conv1.weight.mul_(SILU_GAIN)
            module.conv2.weight.mul_(0.3 * SILU_GAIN)
    vae.encoder.conv_out.weight.mul_(SILU_GAIN)
    vae.decoder.conv_out.weight.mul_(SILU_GAIN)
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0  # the posterior's log variance


def channels_last(vae: Any) -> None:
    """Lays the 3D kernels out as tensor cores like them; activations follow."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def encode_whole(vae: Any, clips: Tensor) -> Tensor:
    """Clips (n, 3, 1 + 4k, h, w) in [-1, 1] to posterior mean and log variance (n, 32, 1 + k, h / 8, w / 8)."""
    x = vae.encoder.conv_in(clips)
    for layer in vae.encoder.down_blocks:
        x = _layer(layer, x)
    x = _middle(vae.encoder.mid_block, x)
    posterior: Tensor = vae.quant_conv(vae.encoder.conv_out(_norm_silu(vae.encoder.norm_out.gamma, x)))
    return posterior


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    """Latents (n, 16, 1 + k, h / 8, w / 8), k at least 1, to clips (n, 3, 1 + 4k, h, w), not clamped."""
    x = _middle(vae.decoder.mid_block, vae.decoder.conv_in(vae.post_quant_conv(latents)))
    for block in vae.decoder.up_blocks:
        for layer in [*block.resnets, *(block.upsamplers or [])]:
            x = _layer(layer, x)
    clips: Tensor = vae.decoder.conv_out(_norm_silu(vae.decoder.norm_out.gamma, x))
    return clips


def _middle(block: Any, x: Tensor) -> Tensor:
    return _residual(block.resnets[1], block.attentions[0](_residual(block.resnets[0], x)))


def _layer(layer: Any, x: Tensor) -> Tensor:
    """One layer over all frames at once. In time the first frame stands alone, as in the stock pass."""
    if isinstance(layer, WanResidualBlock):
        return _residual(layer, x)
    if layer.mode == "downsample3d":
        x = layer(x)
        return torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    if layer.mode == "upsample3d":
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (n, 2, c, t, h, w)
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    resampled: Tensor = layer(x)
    return resampled


def _residual(block: Any, x: Tensor) -> Tensor:
    hidden = block.conv1(_norm_silu(block.norm1.gamma, x))
    hidden = block.conv2(_norm_silu(block.norm2.gamma, hidden))
    total: Tensor = hidden + block.conv_shortcut(x)
    return total


@torch.compile(dynamic=True, disable=not torch.cuda.is_available())
def _norm_silu(gamma: Tensor, x: Tensor) -> Tensor:
    """WanRMS_norm over the channels of x (n, c, t, h, w), then SiLU."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-12) * gamma
    return nn.functional.silu(y).to(x.dtype)


def save_pipeline(
    folder: Path, tokenizer: Any, vae: Any, text_encoder: Any, transformer: Any, image_encoder: Any = None
) -> None:
    """Writes an ordinary diffusers folder in float16; turns the given modules to float16 on the CPU."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    components = {"tokenizer": tokenizer, "scheduler": scheduler}
    components |= {"vae": vae, "text_encoder": text_encoder, "transformer": transformer}
    if image_encoder is None:
        kind = WanPipeline
    else:
        kind = WanImageToVideoPipeline
        components |= {"image_encoder": image_encoder, "image_processor": build_image_processor()}
    for component in components.values():
        if isinstance(component, nn.Module):
            component.cpu().half()
    kind(**components).save_pretrained(folder)
    for file in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        text = file.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor")  # with or without torchvision
        file.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def load_stock_pipeline(folder: Path, device: str = "cpu") -> Any:
    """The folder as a stock WanPipeline or WanImageToVideoPipeline in float32."""
    kind = WanImageToVideoPipeline if (folder / "image_encoder").exists() else WanPipeline
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def reconstruct(folder: Path, clips: Tensor) -> Tensor:
    """Clips (n, 3, frames, h, w) in [-1, 1], as the folder's VAE gives them back in float32."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    return torch.cat([vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample for clip in clips])

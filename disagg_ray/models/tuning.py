"""A stage's options put into effect on loaded models, through diffusers' and torch's own switches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from disagg_ray.config.model import ModelConfig
from disagg_ray.config.options import DenoiserConfig, StepCacheConfig, VaeConfig
from disagg_ray.errors import ConfigError
from disagg_ray.models.attention import fastest_attention, set_attention
from disagg_ray.models.families import model_of
from disagg_ray.models.lora import load_loras

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks

CACHES = {
    "first_block": FirstBlockCacheConfig,
    "mag": MagCacheConfig,
    "sea": SeaCacheConfig,
    "taylorseer": TaylorSeerCacheConfig,
}


def tune_transformer(
    key: str,
    name: str,
    transformer: Any,
    options: DenoiserConfig,
    sizes: Sequence[Tensor],
    text_tokens: int,
    ranks: Ranks | None = None,
) -> None:
    """Change a loaded transformer as its options say, but for its step cache, which each request gets anew.

    `key` names the options in errors. `attention: auto` is measured on `sizes`, latents (1, channels, frames, height,
    width), and on `text_tokens` keys; `ranks` choose alike.

    Raises:
        ConfigError: an option needs a library, a backend or a model that is not here.
        CheckpointError: a LoRA file is missing, unsafe or does not fit.
    """
    load_loras(f"{key}.loras", transformer, [lora for lora in options.loras if lora.transformer == name])
    if options.quantization != "none":
        _quantize(key, transformer, options.quantization)
    if options.attention is not None:
        auto = options.attention == "auto"
        backend = fastest_attention(transformer, sizes, text_tokens, ranks) if auto else options.attention
        set_attention(f"{key}.attention", transformer, backend)
    if options.fuse and not model_of(transformer).fuse(transformer):
        raise ConfigError(f"{key}.fuse: true, but this model has nothing that can be fused; write false")
    if options.compile is not None:  # below the hooks of caches and offloading, which no graph could hold
        _allow_graphs()
        for block in _repeated_blocks(transformer):
            block.forward = torch.compile(block.forward, mode=options.compile, fullgraph=True)


def _repeated_blocks(module: Any) -> list[Any]:
    """Return the blocks that a transformer repeats, as diffusers names them; none of another model."""
    names = getattr(module, "_repeated_blocks", None) or ()
    return [block for block in module.modules() if type(block).__name__ in names]


def renew_step_cache(transformer: Any, cache: StepCacheConfig, num_steps: int) -> None:
    """Give a transformer an empty step cache for one request."""
    if transformer.is_cache_enabled:
        transformer.disable_cache()
    asked: dict[str, Any] = {"threshold": cache.threshold, "cache_interval": cache.interval}
    if cache.method == "mag":
        asked |= {"mag_ratios": cache.ratios, "num_inference_steps": num_steps}
    if cache.method == "taylorseer":
        asked |= {"use_lite_mode": True}  # diffusers' default may find no layer; all of them would take tens of GB
    given = {name: value for name, value in asked.items() if value is not None}
    transformer.enable_cache(CACHES[cache.method](**given))


def tune_vae(vae: Any, options: VaeConfig) -> None:
    """Change a loaded VAE as its options say, but for its tiling, which depends on the request."""
    if options.autotune:
        torch.backends.cudnn.benchmark = True
    if options.channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.dim()])
    if options.compile:
        _allow_graphs()
        fused = torch.compile(_norm_silu, dynamic=True)
        for block in vae.modules():
            if isinstance(getattr(block, "nonlinearity", None), nn.SiLU):
                _fuse_norms(block, model_of(vae).norms, fused)


def _allow_graphs() -> None:
    """Let torch compile as many graphs of one function as there are channel counts, sizes and transformers."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def _fuse_norms(block: Any, norms: Any, fused: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let each norm of a residual block, or the last of a whole half, apply the activation that follows it."""
    for norm in block.children():
        if isinstance(norm, norms):
            norm.forward = partial(_call_with_gamma, fused, norm)
    block.nonlinearity = nn.Identity()


def _call_with_gamma(fused: Callable[[Tensor, Tensor], Tensor], norm: Any, x: Tensor) -> Tensor:
    return fused(norm.gamma, x)  # read anew each time: offloading moves it


def _norm_silu(gamma: Tensor, x: Tensor) -> Tensor:
    """Return the root-mean-square norm over the channels of x (n, c, t, h, w), then SiLU, rounded once."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-24) * gamma
    return nn.functional.silu(scaled).to(x.dtype)


def offload_groups(module: Any, device: str) -> None:
    """Keep a model's weights on the host; each group of layers visits the device for its own work."""
    blocks = bool(_repeated_blocks(module))
    apply_group_offloading(
        module,
        onload_device=torch.device(device),
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
        use_stream=device == "cuda",  # the next group comes while one works
    )


def offload_models(modules: Iterable[Any], device: str) -> list[Any]:
    """Keep models on the host, each on the device while it works; return hooks whose `offload` sends them home."""
    hooks: list[Any] = []
    for module in modules:
        _, hook = cpu_offload_with_hook(module, torch.device(device), hooks[-1] if hooks else None)
        hooks.append(hook)
    return hooks


def choose_scheduler(scheduler: Any, model: ModelConfig) -> Any:
    """Return the checkpoint's scheduler, or the one the configuration names, with its shift."""
    config = scheduler.config
    shift = model.flow_shift
    if shift is None:
        shift = config.get("flow_shift", config.get("shift", 1.0))
    if model.scheduler == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    if model.scheduler == "unipc":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return UniPCMultistepScheduler.from_config(config, **flow)
    if model.flow_shift is None:
        return scheduler
    name = "flow_shift" if "flow_shift" in config else "shift"
    return type(scheduler).from_config(config, **{name: shift})


def _quantize(key: str, transformer: Any, quantization: str) -> None:
    if quantization == "fp8_storage":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"{key}.quantization: fp8 needs the library torchao, which is not installed here; install it or write "
            f"fp8_storage"
        )
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # torchao's settings of the compiler hold for the whole process and have it try many kernels for minutes
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    for block in _repeated_blocks(transformer):
        quantize_(block, config)

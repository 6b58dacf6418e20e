"""Makes checkpoints of random weights: ordinary diffusers folders, of any shape in `shapes`."""

import json
import math
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from disagg_ray.models.wan.component_configs import (
    ImageEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)
from disagg_ray.models.wan.shapes import Shape, get_shape

ComponentConfig = TextEncoderConfig | ImageEncoderConfig | VaeConfig | TransformerConfig | SchedulerConfig

Record = dict[str, str | int]

RECORD_FILE = "disagg_ray.json"
"""In a checkpoint made here: of what it was made."""

MAX_PROMPT_TOKENS = 512
"""Tokens of a prompt with its end, as the published tokenizers announce them."""


def make_checkpoint(shape: str, folder: Path, *, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> Path:
    """Write a checkpoint of seeded random weights, unless the folder already holds it, and return the folder.

    The folder appears whole or not at all. The same arguments give the same bytes; another kind of device draws other
    numbers. Needs memory on the device for the largest component.
    Raises ValueError for an unknown shape or dtype, FileExistsError where the folder holds something else.
    """
    components = get_shape(shape)
    weights_dtype = _floating_dtype(dtype)
    record: Record = {"shape": shape, "seed": seed, "dtype": dtype}
    if _is_made(folder, record):
        return folder
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        _write_components(components, partial, seed, weights_dtype, torch.device(device))
        (partial / RECORD_FILE).write_text(json.dumps(record) + "\n")
        _publish(partial, folder, record)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def build_meta(shape: Shape) -> dict[str, torch.nn.Module]:
    """Every component that has weights, by its name in the pipeline, on the meta device: sizes without memory."""
    with torch.device("meta"):
        built: dict[str, torch.nn.Module | None] = {
            "text_encoder": _transformers_model("UMT5EncoderModel", "UMT5Config", shape.text_encoder),
            "image_encoder": _transformers_model("CLIPVisionModel", "CLIPVisionConfig", shape.image_encoder),
            "vae": _diffusers_component("AutoencoderKLWan", shape.vae),
            "transformer": _diffusers_component("WanTransformer3DModel", shape.transformer),
            "transformer_2": _diffusers_component("WanTransformer3DModel", shape.transformer_2),
        }
    return {name: module for name, module in built.items() if module is not None}


def build_random(config: TransformerConfig, dtype: str, device: str, seed: int = 0) -> Any:
    """Return a transformer of seeded random weights, in the precisions that diffusers would load it in.

    Nothing is written; needs memory on the device for the weights alone.
    """
    with torch.device("meta"):
        module: Any = _diffusers_component("WanTransformer3DModel", config)
    rope = type(module.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)  # a table
    _draw(module, _floating_dtype(dtype), torch.Generator(device).manual_seed(seed))
    module.rope = rope.to(device)
    for name, parameter in module.named_parameters():
        if set(module._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.float()
    return module.eval().requires_grad_(False)


def build_component(shape: Shape, name: str, dtype: str, device: str, seed: int = 0) -> Any:
    """Return a text encoder or VAE of seeded random weights; nothing is written."""
    module: Any = build_meta(shape)[name]
    _draw(module, _floating_dtype(dtype), torch.Generator(device).manual_seed(seed))
    return module.eval().requires_grad_(False)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as UMT5's in all but its vocabulary: one token a printable ASCII character, else one a UTF-8 byte.

    It has 354 tokens: 0 pads, 1 ends, 2 is unknown (and never needed).
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    byte_tokens = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    characters = [(character, -2.0) for character in ("▁", *map(chr, range(ord("!"), ord("~") + 1)))]
    tokenizer = Tokenizer(models.Unigram([*special, *byte_tokens, *characters], unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_PROMPT_TOKENS,
    )


def _transformers_model(model: str, configuration: str, config: ComponentConfig | None) -> Any:
    if config is None:
        return None
    return getattr(transformers, model)(getattr(transformers, configuration)(**_arguments(config)))


def _diffusers_component(component: str, config: ComponentConfig | None) -> Any:
    return None if config is None else getattr(diffusers, component)(**_arguments(config))


def _image_processor(config: ImageEncoderConfig) -> Any:
    side = config.image_size
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _arguments(config: ComponentConfig) -> dict[str, Any]:
    """Keyword arguments of the component; its constructor wants lists for sequences, as JSON gives them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def _write_components(shape: Shape, folder: Path, seed: int, dtype: torch.dtype, device: torch.device) -> None:
    modules = build_meta(shape)
    others: dict[str, Any] = {
        "tokenizer": make_tokenizer(),
        "scheduler": _diffusers_component("UniPCMultistepScheduler", shape.scheduler),
    }
    if shape.image_encoder:
        others["image_processor"] = _image_processor(shape.image_encoder)
    for name, component in others.items():
        component.save_pretrained(folder / name)
    _write_index(shape, {**modules, **others}, folder)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in modules.items():
        _write_weights(module, folder / name, dtype, generator)


def _write_index(shape: Shape, components: dict[str, Any], folder: Path) -> None:
    """Let the stock pipeline write `model_index.json` of the components, on whatever device."""
    settings = {"boundary_ratio": shape.boundary_ratio, "expand_timesteps": shape.expand_timesteps}
    pipeline = getattr(diffusers, shape.pipeline)(**components, **settings)
    pipeline.save_config(folder)
    index = folder / "model_index.json"
    # The published checkpoints name the class that takes torchvision where it is installed.
    index.write_text(index.read_text().replace('"CLIPImageProcessorPil"', '"CLIPImageProcessor"'))


def _write_weights(module: Any, folder: Path, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Draw a meta module's parameters on the generator's device, save them and free them again."""
    _draw(module, dtype, generator)
    module.save_pretrained(folder)
    torch.nn.Module.to(module, "meta")


def _draw(module: Any, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Draw a meta module's parameters on the generator's device; buffers stay empty: none of these models saves any."""
    torch.nn.Module.to(module, dtype)  # diffusers' own warns of float32 layers, which is for loading to decide
    module.to_empty(device=generator.device)
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()  # to_empty gave tied parameters a tensor each
    for name, parameter in module.named_parameters():
        mean, std = _mean_std(name, parameter.shape)
        parameter.data.normal_(mean, std, generator=generator)


def _mean_std(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter such that activations stay near 1 and nothing is symmetric."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return 1.0, 0.1  # a norm
    if name == "shared.weight":
        return 0.0, 1.0  # token embeddings
    return 0.0, math.prod(shape[1:]) ** -0.5


def _publish(partial: Path, folder: Path, record: Record) -> None:
    """Rename into place; where another process was quicker with the same checkpoint, keep that one."""
    try:
        partial.rename(folder)
    except OSError:
        if not _is_made(folder, record):
            raise


def _is_made(folder: Path, record: Record) -> bool:
    """Whether the folder holds that checkpoint, whole; FileExistsError where it holds anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    path = folder / RECORD_FILE
    found: Record | None = json.loads(path.read_text()) if path.is_file() else None
    if found != record:
        raise FileExistsError(f"{folder} holds {found or 'other files'}, not {record}: name another folder")
    return True


def _floating_dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"no weight dtype {name!r}: one of {', '.join(dtypes)}")
    return dtypes[name]

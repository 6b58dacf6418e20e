"""What a request's latents follow from, as digests: they alone say whether something made before may be used again.

Latents follow from the request, the pixels of its images, and from each block that had a part in them: its weights,
precision, threads and options. A block's digest is the same in whatever stage the block runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.models.families import FAMILIES
from disagg_ray.models.provenance import digest_file, digest_model, local_folder
from disagg_ray.request import ResolvedRequest
from disagg_ray.version import NUMERICS

NOT_LATENTS = ("id", "priority", "fps", "format")
"""Fields of a request that change nothing before the decode; fps does where there is sound, whose latents are kept in
no file."""
COMPONENT_OF = {
    "text_encoder": "text_encoder", "image_encoder": "image_encoder", "vae_encoder": "vae", "denoise": "transformer",
    "decode": "vae", "blend": "vae",
}  # fmt: skip
"""Whose precision counts, by block, with that of components that share its key."""
LIBRARIES = (
    "torch", "diffusers", "transformers", "tokenizers", "ftfy", "pillow", "peft", "torchao", "flash-attn",
    "flash-attn-3", "flash-attn-4", "sageattention", "xformers",
)  # fmt: skip
"""Those that have a part in the numbers; some are optional."""


def identify_request(request: ResolvedRequest) -> str:
    """Return the digest of all in a request that its latents follow from."""
    return _digest({name: value for name, value in asdict(request).items() if name not in NOT_LATENTS})


def identify_blocks(config: Config, stage: str, folder: Path | None) -> dict[str, str]:
    """Return by block of a stage the digest of all that its outputs follow from, beside request and other blocks.

    `folder` is the model's on this machine, if it is known.
    """
    settings = config.stages[stage]
    model = {name: value for name, value in asdict(config.model).items() if name != "dtype"}
    common = {"model": model, "files": digest_model(config.model, folder), "versions": _versions()}
    return {block: _digest(common | _options(config, stage, block)) for block in settings.blocks}


def identify_setup(config: Config) -> str:
    """Return the digest of all that decides a video besides its request, with files as this machine sees them."""
    folder = local_folder(config.model)
    blocks: dict[str, str] = {}
    for stage in config.stages:
        blocks |= identify_blocks(config, stage, folder)
    return _digest([blocks, asdict(config.defaults), asdict(config.output)])[:16]


def _options(config: Config, stage: str, block: str) -> dict[str, Any]:
    """Return what in a stage's settings changes a block's numbers; offload does not."""
    settings, kind = config.stages[stage], block.split(".", maxsplit=1)[0]
    component = COMPONENT_OF.get(kind)
    names = _sharing(config, component) if component else sorted(set(COMPONENT_OF.values()))
    options = {
        "block": block,
        "dtypes": [config.dtype_of(stage, name) for name in names],
        "threads": settings.torch_threads,
        "device": settings.torch_device,
    }
    if component in (None, "transformer"):
        options["denoiser"] = _denoiser(settings)
    if component in (None, "vae"):
        options["vae"] = asdict(settings.vae)
    return options


def _sharing(config: Config, component: str) -> list[str]:
    """Return the components whose precision has a component's key; a stage's `vae.dtype` is of the VAE alone."""
    components = FAMILIES[config.model.family].components
    return [component, *(name for name, kind in components.items() if kind.dtype_of == component)]


def _denoiser(settings: StageConfig) -> dict[str, Any]:
    """Return the transformers' options, with what LoRA files hold in place of their names."""
    loras = [asdict(lora) | {"path": digest_file(lora.path)} for lora in settings.denoiser.loras]
    return asdict(settings.denoiser) | {"loras": loras}


@cache
def _versions() -> Mapping[str, str | int | None]:
    return {**{name: _version(name) for name in LIBRARIES}, "numerics": NUMERICS}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

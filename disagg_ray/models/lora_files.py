"""What a LoRA file's header says, checked without a library of models: before anything starts, and before a load."""

from __future__ import annotations

import re
from pathlib import Path

from disagg_ray.config.schema import Config
from disagg_ray.environment import expand_home
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import MAX_LAYERS
from disagg_ray.models.files import one_line, read_header
from disagg_ray.text import printable

PREFIXES = ("transformer.", "diffusion_model.", "lora_unet_")
"""Of the formats that diffusers reads: its own, the original model's, and musubi's."""


def check_loras(config: Config, *, whole: bool) -> None:
    """Check the LoRA files of all stages; unless `whole`, those that are not here may be on another machine.

    Raises:
        CheckpointError: a file is missing, malformed, or no LoRA.
    """
    for stage, settings in config.stages.items():
        for lora in settings.denoiser.loras:
            file = expand_home(lora.path)
            if whole or file.is_file():
                check_header(f"stages.{stage}.denoiser.loras: {printable(lora.path)!r}", file)


def check_header(name: str, file: Path) -> None:
    """Refuse a file that is no LoRA by its header; `name` says in errors which.

    Raises:
        CheckpointError: the file is missing, malformed, or holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{name} is no file on this node; give a .safetensors file")
    try:
        header = read_header(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read as a LoRA: {one_line(error)}") from error
    stray = [key for key in header if not key.startswith(PREFIXES)]
    if stray or not header:
        raise CheckpointError(
            f"{name} does not fit this model: {len(stray)} of its {len(header)} keys begin with none of "
            f"{', '.join(PREFIXES)}" + (f", as {printable(stray[0])!r}" if stray else "")
        )
    for key, tensor in header.items():
        if not (tensor.is_floating or key.endswith(".alpha")) or not tensor.num_elements or len(tensor.shape) > 5:
            raise CheckpointError(f"{name} holds {printable(key)!r} of {tensor.dtype} {list(tensor.shape)}")
        if any(int(number) > MAX_LAYERS for number in re.findall(r"\d{1,9}", key)):
            raise CheckpointError(f"{name} does not fit this model: no layer has the number in {printable(key)!r}")

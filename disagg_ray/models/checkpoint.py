"""A diffusers-format model folder: found, checked and measured without loading a weight."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config import ModelConfig
from disagg_ray.environment import cache_folder, expand_home
from disagg_ray.errors import CheckpointError
from disagg_ray.options import tile_tensors

logger = logging.getLogger("disagg_ray")

IMAGE_TEXT_TOKENS = 512
"""What diffusers' `WanAttnProcessor` splits image tokens from text tokens at, whatever the text's length is."""

BUILTIN = "builtin:"
RANDOM = "random:"
PIPELINES = {"WanPipeline": ("t2v",), "WanImageToVideoPipeline": ("i2v", "flf2v")}
"""Pipeline classes of the model families that are known, and the tasks they serve."""


@dataclass(frozen=True)
class Geometry:
    """The numbers of a checkpoint that decide the sizes of tensors between stages."""

    text_dim: int
    """Width of a text embedding."""
    max_sequence_length: int
    """Tokens of a text embedding."""
    latent_channels: int
    spatial_factor: int
    """Pixels a latent spans, in height and in width."""
    temporal_factor: int
    """Frames a latent spans."""
    image_tokens: int
    """Tokens of the embedding of one image; 0 without an image encoder."""
    image_dim: int
    two_transformers: bool
    boundary_ratio: float | None

    def latents_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of a video's latents, which are float32."""
        times = (num_frames - 1) // self.temporal_factor + 1
        return (1, self.latent_channels, times, height // self.spatial_factor, width // self.spatial_factor)

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        """Return an upper bound (4 bytes an element, images 1) of every tensor that may travel between stages.

        `pixels` is height x width of the video; `image_pixels` that of the larger conditioning image as given;
        `num_parts` share the tiles of a decode.
        """
        latents = pixels // self.spatial_factor**2 * ((num_frames - 1) // self.temporal_factor + 1)
        prompt = 4 * self.max_sequence_length * self.text_dim
        return {
            "prompt_embeds": prompt,
            "negative_prompt_embeds": prompt,
            "image_embeds": 2 * 4 * self.image_tokens * self.image_dim,
            "image_condition_latents": 4 * (self.latent_channels + self.temporal_factor) * latents,
            "first_frame_latents": 4 * self.latent_channels * latents,
            "first_last_frame_latents": 4 * self.latent_channels * latents,
            "latents": 4 * self.latent_channels * latents,
            "image": 3 * image_pixels,
            "last_image": 3 * image_pixels,
            **{name: 4 * 3 * num_frames * _part_pixels(pixels, num_parts) for name in tile_tensors(num_parts)},
        }


def _part_pixels(pixels: int, num_parts: int) -> int:
    """Return an upper bound of the pixels of one part's tiles.

    Tiles of 256 x 256 begin every 192 pixels: together they are at most 4/3 as high and as wide as the video. Each is
    dealt to the part with the least, which therefore gets at most its share and one tile more.
    """
    return -(-16 * pixels // (9 * num_parts)) + min(pixels, 256 * 256)


@dataclass(frozen=True)
class Checkpoint:
    """A local model folder whose index and configurations have been read."""

    model: ModelConfig
    folder: Path
    components: dict[str, str]
    """Class name by component, as model_index.json lists them."""
    geometry: Geometry

    def fetch(self, names: Iterable[str]) -> None:
        """Bring the named components' files here and check that each can be loaded safely.

        Raises:
            CheckpointError: a component is missing, or has weights in another format than safetensors.
        """
        names = sorted(names)
        if _is_hub_id(self.model.path):
            _download(self.model, [f"{name}/*" for name in names])
        for name in names:
            _check_component(self.folder / name, self.components.get(name))

    def count_parameters(self, name: str) -> int | None:
        """Return a component's parameters, from its files' headers; None: the hub has not been asked for it yet.

        Raises:
            CheckpointError: the component is missing, or has weights in another format than safetensors.
        """
        folder = self.folder / name
        files = sorted(folder.glob("*.safetensors"))
        if not files and _is_hub_id(self.model.path):
            return None
        _check_component(folder, self.components.get(name))
        return sum(_count_parameters(path) for path in files)


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Find the folder of `model.path` on this machine and read its configurations.

    Raises:
        CheckpointError: no such folder, no such repository, another task than `model.task`, or an unknown model.
    """
    folder = _find(model)
    index = _read_json(folder / "model_index.json")
    components = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    if index.get("expand_timesteps"):
        raise CheckpointError(f"model.path: {model.path!r} is a TI2V-5B model (expand_timesteps), not supported yet")
    tasks = PIPELINES.get(index.get("_class_name", ""))
    if tasks is None:
        known = ", ".join(PIPELINES)
        raise CheckpointError(f"model.path: {model.path!r} holds a {index.get('_class_name')}; known are {known}")
    if model.task not in tasks:
        raise CheckpointError(
            f"model.task: {model.task!r} does not fit {model.path!r}, which serves {' or '.join(tasks)}"
        )
    try:
        return Checkpoint(model, folder, components, _geometry(model, folder, index, components))
    except KeyError as error:
        raise CheckpointError(f"model.path: {model.path!r} lacks {error} in a component's config.json") from error


def _find(model: ModelConfig) -> Path:
    if model.path.startswith(BUILTIN):
        return _builtin(model.path.removeprefix(BUILTIN))
    if model.path.startswith(RANDOM):
        from disagg_ray.models.maker import make_checkpoint  # costs an import of every model class

        shape = model.path.removeprefix(RANDOM)
        try:
            return make_checkpoint(shape, cache_folder() / "random" / shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"model.path: {model.path!r} cannot be made: {error}") from error
    if _is_hub_id(model.path):
        return _download(model, ["*.json"])
    folder = expand_home(model.path)
    if not folder.is_dir():
        raise CheckpointError(
            f"model.path: {model.path!r} is no folder on this node; give a diffusers-format folder "
            f"or a hub id (org/name)"
        )
    return folder


def _builtin(name: str) -> Path:
    known = {folder.name: folder for folder in sorted((Path(__file__).parent.parent / "builtin").iterdir())}
    if name not in known:
        raise CheckpointError(f"model.path: no model {name!r} comes with the package; known are {', '.join(known)}")
    return known[name]


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and path[0] not in ".~" and not Path(path).exists()


def _download(model: ModelConfig, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    if model.revision is None:
        raise CheckpointError(
            f"model.revision: null, but {model.path!r} is no folder on this node, and a hub id needs a commit or a tag"
        )
    allowed = [p for pattern in patterns for p in ([pattern] if pattern.endswith(".json") else _safe_files(pattern))]
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=allowed))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"model.path: {model.path!r} could not be fetched from the hub: {reason}") from error


def _safe_files(pattern: str) -> list[str]:
    return [pattern + suffix for suffix in (".json", ".safetensors", ".model", ".txt")]


def _check_component(folder: Path, class_name: str | None) -> None:
    name = folder.name
    if class_name is None:
        raise CheckpointError(f"model.path: {str(folder.parent)!r} does not list the component {name!r}")
    if not folder.is_dir():
        raise CheckpointError(f"model.path: the component folder {str(folder)!r} is missing")
    if not (folder / "config.json").is_file():
        return  # tokenizers, processors and schedulers hold no weights
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"model.path: {str(folder)!r} holds no .safetensors file; other formats are not loaded")


def _count_parameters(path: Path) -> int:
    """Return the elements of all tensors of a safetensors file: its length-prefixed JSON header lists their shapes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _geometry(model: ModelConfig, folder: Path, index: dict[str, Any], components: dict[str, str]) -> Geometry:
    transformer = _read_json(folder / "transformer" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    wants_image = transformer.get("image_dim") is not None
    image_tokens = image_dim = 0
    if "image_encoder" in components and wants_image:
        image = _read_json(folder / "image_encoder" / "config.json")
        image_tokens = (image["image_size"] // image["patch_size"]) ** 2 + 1
        image_dim = image["hidden_size"]
    if transformer.get("added_kv_proj_dim") is not None and model.max_sequence_length != IMAGE_TEXT_TOKENS:
        logger.warning(
            "model.max_sequence_length: %d is not what %r expects: its attention takes the last %d tokens for text and "
            "those before for the image, as the stock pipeline does", model.max_sequence_length, model.path,
            IMAGE_TEXT_TOKENS,
        )  # fmt: skip
    first_and_last = transformer.get("pos_embed_seq_len") is not None
    if model.task != "t2v" and wants_image and first_and_last != (model.task == "flf2v"):
        right = "flf2v" if first_and_last else "i2v"
        raise CheckpointError(f"model.task: {model.task!r} does not fit {model.path!r}; write {right}")
    downsample = vae.get("temperal_downsample", [False, True, True])  # diffusers' spelling
    return Geometry(
        text_dim=transformer["text_dim"],
        max_sequence_length=model.max_sequence_length,
        latent_channels=vae["z_dim"],
        spatial_factor=2 ** len(downsample),
        temporal_factor=2 ** sum(downsample),
        image_tokens=image_tokens,
        image_dim=image_dim,
        two_transformers="transformer_2" in components,
        boundary_ratio=model.boundary_ratio if model.boundary_ratio is not None else index.get("boundary_ratio"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model.path: {str(path)!r} is missing; is the folder a diffusers-format model?"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"model.path: {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"model.path: {str(path)!r} must hold a JSON object")
    return loaded

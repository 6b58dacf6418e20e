"""A diffusers-format model folder: found, checked and measured without loading a weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_ray.config.builtin import BUILTIN
from disagg_ray.config.options import tile_tensors
from disagg_ray.config.schema import ModelConfig
from disagg_ray.environment import cache_folder, expand_home
from disagg_ray.errors import CheckpointError
from disagg_ray.models.components import (
    KINDS,
    SMALL,
    check_component,
    check_inside,
    check_ti2v,
    read_components,
    read_config,
    read_tensors,
    weight_files,
)
from disagg_ray.models.files import read_json
from disagg_ray.text import printable

logger = logging.getLogger("disagg_ray")

IMAGE_TEXT_TOKENS = 512
"""What diffusers' `WanAttnProcessor` splits image tokens from text tokens at, whatever the text's length is."""

RANDOM = "random:"
PIPELINES = {"WanPipeline": ("t2v",), "WanImageToVideoPipeline": ("i2v", "flf2v")}
"""Pipeline classes of the model families that are known, and the tasks they serve."""
TI2V = ("ti2v",)
"""Tasks of a model of either class with a timestep a token (`expand_timesteps`)."""


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
    expand_timesteps: bool = False
    """Whether each token has a timestep of its own (TI2V)."""

    def latents_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of a video's latents, which are float32."""
        times = (num_frames - 1) // self.temporal_factor + 1
        return (1, self.latent_channels, times, height // self.spatial_factor, width // self.spatial_factor)

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        """Return an upper bound (4 bytes an element, images 1) of every tensor that may pass between stages.

        `pixels` is height x width of the video; `image_pixels` that of the larger conditioning image as given;
        `num_parts` share the tiles of a decode.
        """
        latents = pixels // self.spatial_factor**2 * ((num_frames - 1) // self.temporal_factor + 1)
        prompt = 4 * self.max_sequence_length * self.text_dim
        return {
            "prompt_embeds": prompt,
            "negative_prompt_embeds": prompt,
            "image_embeds": 2 * 4 * self.image_tokens * self.image_dim,
            "image_latents": 4 * self.latent_channels * (pixels // self.spatial_factor**2),
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
        """Bring the named components' files here and check every file that will be opened.

        Raises:
            CheckpointError: a component is missing, malformed, unsafe, or not of the class that this family expects.
        """
        names = sorted(names)
        for name in names:
            self._check_listed(name)
        if _is_hub_id(self.model.path):
            _download(self.model, [pattern for name in names for pattern in self._files(name)])
        for name in names:
            self.check(name)

    def check(self, name: str) -> None:
        """Check every file of a component that will be opened, all of which must be here.

        Raises:
            CheckpointError: as `fetch`.
        """
        self._check_listed(name)
        check_component(self.folder, name)

    def _files(self, name: str) -> list[str]:
        """Return patterns of a component's files in its repository, of which the indexes are here already."""
        small = [f"{name}/*{suffix}" for suffix in SMALL]
        weights = weight_files(self.folder, name) if KINDS[name].weights is not None else []
        return small + [f"{name}/{path.name}" for path in weights]

    def count_parameters(self, name: str) -> int | None:
        """Return a component's parameters, from its files' headers; None: the hub has not been asked for it yet.

        Raises:
            CheckpointError: the component is missing, or has weights in another format than safetensors.
        """
        self._check_listed(name)
        remote = _is_hub_id(self.model.path)
        check_component(self.folder, name, partial=remote)
        if KINDS[name].weights is None:
            return 0
        if remote and not all(path.is_file() for path in weight_files(self.folder, name)):
            return None
        return sum(tensor.num_elements for tensor in read_tensors(self.folder, name))

    def _check_listed(self, name: str) -> None:
        if name not in self.components:
            raise CheckpointError(f"model.path: {str(self.folder)!r} does not list the component {name!r}")


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Find the folder of `model.path` on this machine and read its configurations.

    Raises:
        CheckpointError: no such folder, no such repository, another task than `model.task`, or an unknown model.
    """
    folder = _find(model)
    path = folder / "model_index.json"
    check_inside(path, folder)
    index = read_json(path)
    tasks = PIPELINES.get(str(index.get("_class_name")))
    if tasks is None:
        kind = printable(str(index.get("_class_name")))
        raise CheckpointError(f"model.path: {model.path!r} holds a {kind}; known are {', '.join(PIPELINES)}")
    tasks = TI2V if index.get("expand_timesteps") else tasks
    if model.task not in tasks:
        raise CheckpointError(
            f"model.task: {model.task!r} does not fit {model.path!r}, which serves {' or '.join(tasks)}"
        )
    try:
        components = read_components(index, path)
        return Checkpoint(model, folder, components, _geometry(model, folder, index, components))
    except KeyError as error:
        raise CheckpointError(f"model.path: {model.path!r} lacks {error} in a component's config.json") from error


def check_here(model: ModelConfig, *, whole: bool) -> None:
    """Check what of a model this machine has, so that a fault shows before anything starts.

    `whole`: the stages run here and nowhere else, so what is missing here is a fault.

    Raises:
        CheckpointError: as `open_checkpoint` and `Checkpoint.fetch`.
    """
    if model.path.startswith(RANDOM):
        return  # made where it is wanted
    remote = _is_hub_id(model.path)
    if not whole and (remote or find_here(model) is None):
        return
    checkpoint = open_checkpoint(model)
    for name in checkpoint.components:
        check_component(checkpoint.folder, name, partial=remote or not whole)


def find_here(model: ModelConfig) -> Path | None:
    """Return a model's folder if this machine has it already; nothing is made or fetched."""
    if model.path.startswith(BUILTIN):
        return _builtin(model.path.removeprefix(BUILTIN))
    if model.path.startswith(RANDOM):
        folder = cache_folder() / "random" / model.path.removeprefix(RANDOM)
    elif _is_hub_id(model.path):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.path, "model_index.json", revision=model.revision)
        return Path(found).parent if isinstance(found, str) else None
    else:
        folder = expand_home(model.path)
    return folder if (folder / "model_index.json").is_file() else None


def _find(model: ModelConfig) -> Path:
    if model.path.startswith(BUILTIN):
        return _builtin(model.path.removeprefix(BUILTIN))
    if model.path.startswith(RANDOM):
        from disagg_ray.models.wan.random import make_checkpoint

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
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"model.path: {model.path!r} could not be fetched from the hub: {reason}") from error


def _geometry(model: ModelConfig, folder: Path, index: dict[str, Any], components: dict[str, str]) -> Geometry:
    transformer = read_config(folder, "transformer")
    vae = read_config(folder, "vae")
    wants_image = transformer.get("image_dim") is not None
    image_tokens = image_dim = 0
    if "image_encoder" in components and wants_image:
        image = read_config(folder, "image_encoder")
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
    if index.get("expand_timesteps"):
        check_ti2v(model, transformer, vae, components)
    downsample = vae.get("temperal_downsample", [False, True, True])  # diffusers' spelling
    return Geometry(
        text_dim=transformer["text_dim"],
        max_sequence_length=model.max_sequence_length,
        latent_channels=vae["z_dim"],
        spatial_factor=2 ** len(downsample) * (vae.get("patch_size") or 1),
        temporal_factor=2 ** sum(downsample),
        image_tokens=image_tokens,
        image_dim=image_dim,
        two_transformers="transformer_2" in components,
        boundary_ratio=model.boundary_ratio if model.boundary_ratio is not None else index.get("boundary_ratio"),
        expand_timesteps=bool(index.get("expand_timesteps")),
    )

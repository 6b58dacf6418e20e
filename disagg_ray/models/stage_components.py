"""The components of one stage: loaded from the checkpoint and set up as the stage's options say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from disagg_ray.config.options import TRANSFORMERS, DenoiserConfig, VaeConfig
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.stages import StageConfig
from disagg_ray.errors import ConfigError
from disagg_ray.models.attention import FLASH_4, check_flash_4, check_shared_attention
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.load import check_scheduler, check_tensors, load_component, reserve, weight_bytes
from disagg_ray.models.model import Model
from disagg_ray.models.tuning import choose_scheduler, offload_groups, offload_models, tune_transformer, tune_vae
from disagg_ray.models.warm_up import example_tensors

if TYPE_CHECKING:
    from disagg_ray.models.parallel.ranks import Ranks


class StageComponents:
    """Loads and sets up what one stage's blocks need of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, stage: str, model: Model, names: Sequence[str]) -> None:
        self.names = tuple(names)
        """Of the components that are loaded from the checkpoint."""
        self.offloaded: list[Any] = []
        """diffusers' hooks that bring a model back to the host after a request."""
        self._checkpoint = checkpoint
        self._stage = stage
        self._model = model

    @property
    def transformers(self) -> list[str]:
        return [name for name in TRANSFORMERS if name in self.names]

    def load(
        self,
        dtypes: Mapping[str, str],
        device: str,
        options: StageConfig,
        sizes: Sequence[Sequence[int]],
        ranks: Ranks | None = None,
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Return the components, set up as the stage's options say, and the bytes of their weights, both by name.

        `sizes` (height, width, num_frames) are those at which `attention: auto` is timed. With `ranks`, every one of
        them loads and runs the same.

        Raises:
            CheckpointError: a component is missing, unsafe or unreadable.
            ConfigError: an option cannot be had here.
        """
        self._options, self._ranks = options, ranks
        self._check_options()
        self._check_attention(dtypes, device)
        self._checkpoint.fetch(self.names)
        loaded, weights = {}, {}
        for name in self.names:
            on_host = options.offload != "none" or (options.parallel.shard_weights and name in TRANSFORMERS)
            home = "cpu" if on_host else device
            loaded[name] = model = self._load_component(name, dtypes[name], home)
            if isinstance(model, torch.nn.Module):
                weights[name] = weight_bytes(model)
                self._tune(name, model, device, sizes)
            if ranks is not None and name in TRANSFORMERS:
                from disagg_ray.models.parallel.spread import spread  # torch.distributed is for gangs alone

                weights[name] = spread(f"stages.{self._stage}", model, ranks)
        if options.offload == "model":
            self.offloaded = offload_models((loaded[name] for name in weights), device)
        return loaded, weights

    def _check_options(self) -> None:
        """Refuse options of models that the stage does not hold."""
        options, key = self._options, f"stages.{self._stage}"
        for name, asked, plain in (
            ("transformer", options.denoiser, DenoiserConfig()),
            ("vae", options.vae, VaeConfig()),
        ):
            if asked != plain and name not in self.names:
                section = "vae" if name == "vae" else "denoiser"
                raise ConfigError(f"{key}.{section}: given, but the stage's blocks hold no {name}; leave it out")
        for lora in options.denoiser.loras:
            if lora.transformer not in self.names:
                raise ConfigError(f"{key}.denoiser.loras: this model has no {lora.transformer}; write transformer")

    def _check_attention(self, dtypes: Mapping[str, str], device: str) -> None:
        """Refuse a backend that cannot run here or be shared by ranks, before any weights are loaded."""
        key, backend = f"stages.{self._stage}.denoiser.attention", self._options.denoiser.attention
        if backend == FLASH_4:
            dims = {n: self._checkpoint.read_config(n)["attention_head_dim"] for n in self.transformers}
            for name, dim in dims.items():
                check_flash_4(key, device, dtypes[name], dim)
        if backend not in (None, "auto") and self._options.parallel.num_shards > 1:
            check_shared_attention(key, backend, device)

    def _tune(self, name: str, model: Any, device: str, sizes: Sequence[Sequence[int]]) -> None:
        options = self._options
        if name in TRANSFORMERS:
            latents = [example_tensors(self._checkpoint, ["latents"], size)["latents"].to(device) for size in sizes]
            text_tokens = self._checkpoint.geometry.max_sequence_length
            key = f"stages.{self._stage}.denoiser"
            tune_transformer(key, name, model, options.denoiser, latents, text_tokens, self._ranks)
            self._model.adapt(model)
        if name == "vae":
            tune_vae(model, options.vae)
            if self._ranks is not None and self._ranks.parallel.rows > 1:
                from disagg_ray.models.parallel.rows import split_rows  # as above

                split_rows(model, self._ranks)
        if options.offload == "group":
            offload_groups(model, device)

    def weight_bytes(self, dtypes: Mapping[str, str], parallel: ParallelConfig) -> int | None:
        """Return about what `load` would, in all, without loading; None: the weights are not on this machine yet.

        The few modules that diffusers keeps in float32 count in the precision that was asked for. Raises
        CheckpointError: a component is missing or unsafe.
        """
        sizes = [self._component_bytes(name, dtypes[name], parallel) for name in self.names]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def _component_bytes(self, name: str, dtype: str, parallel: ParallelConfig) -> int | None:
        count = self._checkpoint.count_parameters(name)
        if count is not None and name in TRANSFORMERS:
            count = parallel.held(count, self._checkpoint.read_config(name)["num_layers"])
        return None if count is None else count * int(getattr(torch, dtype).itemsize)

    def _load_component(self, name: str, dtype: str, device: str) -> Any:
        kind, class_name = self._checkpoint.family.components[name], self._checkpoint.components[name]
        check_tensors(kind, self._checkpoint.folder, name, class_name)
        reserved = (self._component_bytes(name, dtype, self._options.parallel) or 0) if device != "cpu" else 0
        if reserved:
            reserve(reserved, device)
        component = load_component(kind, self._checkpoint.folder, name, class_name, dtype, device)
        if name == "scheduler":
            component = choose_scheduler(component, self._checkpoint.model)
            check_scheduler(component, self._checkpoint.model.sigmas)
        return component

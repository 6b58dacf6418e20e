"""One tiled decode shared out: each block `decode.KofN` decodes some of the tiles, `blend` makes the video of them all.

Both run the whole decode step; only the calls of the VAE's decoder, one a tile and latent frame, are ours. So
whatever diffusers does before, between and after them is done as it does it; a small video, which it does not tile, is
the first part's.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from torch import Tensor, nn

from disagg_ray.config.options import tile_tensors
from disagg_ray.graph import FRAMES
from disagg_ray.models.wan.blocks import Decode


class _Shares:
    """Deals the tiles out as they come, each to the part that has the least work so far."""

    def __init__(self, num_parts: int) -> None:
        self._work = [0] * num_parts
        self._part = 0

    def owner(self, latents: Tensor, first: bool) -> int:
        """Return the part, from 0, whose the next latent frame of a tile is; `first`: a tile begins with it."""
        if first:
            self._part = self._work.index(min(self._work))
            self._work[self._part] += latents.shape[-2] * latents.shape[-1]
        return self._part


class _Keeping(nn.Module):
    """Stands in for a decoder: keeps what it makes of one part's tiles, and hands on nothing."""

    def __init__(self, decoder: nn.Module, part: int, num_parts: int) -> None:
        super().__init__()
        self.decoder, self.kept = decoder, list[Tensor]()
        self._part, self._shares = part, _Shares(num_parts)

    def forward(self, latents: Tensor, first_chunk: bool = False, **cache: Any) -> Tensor:
        if self._shares.owner(latents, first_chunk) == self._part:
            self.kept.append(self.decoder(latents, first_chunk=first_chunk, **cache).flatten())
        return latents.new_empty(1, 0, 1, 1, 1)  # no channels: blending that costs nothing


class _Giving(nn.Module):
    """Stands in for a decoder: gives what the parts' decoders made, in the order in which it is asked for."""

    def __init__(self, vae: Any, tiles: list[Tensor]) -> None:
        super().__init__()
        self._channels, self._num_frames = vae.config.out_channels, vae.config.scale_factor_temporal
        self._scale = vae.spatial_compression_ratio // (vae.config.patch_size or 1)
        self._tiles, self._shares = tiles, _Shares(len(tiles))

    def forward(self, latents: Tensor, first_chunk: bool = False, **cache: Any) -> Tensor:
        part = self._shares.owner(latents, first_chunk)
        height, width = (self._scale * side for side in latents.shape[-2:])
        num_frames = 1 if first_chunk else self._num_frames
        count = self._channels * num_frames * height * width
        given, self._tiles[part] = self._tiles[part][:count], self._tiles[part][count:]
        return given.view(1, self._channels, num_frames, height, width)


class DecodePart(ModularPipelineBlocks):  # type: ignore[misc]
    """Decodes one part's tiles and publishes them as they are, one after the other."""

    model_name = "wan"

    def __init__(self, number: int, num_parts: int) -> None:
        self._number, self._num_parts = number, num_parts
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return list(WanVaeDecoderStep().expected_components)

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(tile_tensors(self._num_parts)[self._number - 1])]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        vae, latents = components.vae, state.get("latents")
        keeping = _Keeping(vae.decoder, self._number - 1, self._num_parts)
        vae.decoder, vae.use_tiling = keeping, True
        try:
            _decode(vae, components.video_processor, latents)
        finally:
            vae.decoder = keeping.decoder
        none = latents.new_zeros(1)  # of a video with fewer tiles than parts
        state.set(self.intermediate_outputs[0].name, torch.cat(keeping.kept or [none]))
        return components, state


class Blend(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes the frames of all parts' tiles; needs the VAE's configuration and none of its weights."""

    model_name = "wan"

    def __init__(self, num_parts: int, folder: Path) -> None:
        """Take the number of parts and the VAE's folder."""
        self._tiles = tile_tensors(num_parts)
        with torch.device("meta"):
            self._vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
        self._vae.post_quant_conv = nn.Identity()
        self._vae.use_tiling = True
        super().__init__()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [spec for spec in WanVaeDecoderStep().expected_components if spec.name == "video_processor"]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(name, required=True) for name in (*self._tiles, "height", "width", "num_frames")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(FRAMES)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        vae = self._vae
        vae.decoder = _Giving(vae, [state.get(name) for name in self._tiles])
        num_frames = 1 + (state.get("num_frames") - 1) // vae.config.scale_factor_temporal
        sides = (state.get(side) // vae.spatial_compression_ratio for side in ("height", "width"))
        latents = torch.empty(1, vae.config.z_dim, num_frames, *sides, device="meta")  # only their shape counts
        state.set(FRAMES, _decode(vae, components.video_processor, latents))
        del vae.decoder
        return components, state


def _decode(vae: Any, video_processor: Any, latents: Tensor) -> Any:
    """Run the whole decode step and return its frames."""
    state = PipelineState()
    state.set("latents", latents)
    Decode()(SimpleNamespace(vae=vae, video_processor=video_processor), state)
    return state.get(FRAMES)

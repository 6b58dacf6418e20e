"""What runs LTX-2: blocks of our own."""

from __future__ import annotations

from typing import Any

from disagg_ray.models.blocks import Stepping
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.models.ltx2.decoding import DecodeFrames, DecodeSound
from disagg_ray.models.ltx2.denoising import Denoise
from disagg_ray.models.ltx2.encoding import EncodeImage, TextEncoder
from disagg_ray.models.ltx2.geometry import LTX2Geometry
from disagg_ray.models.model import Model


class LTX2Model(Model):
    """LTX-2, of a text alone and of a first frame; its blocks read no property of the pipeline."""

    def blocks(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], Stepping]:
        geometry = checkpoint.geometry
        assert isinstance(geometry, LTX2Geometry)
        denoise = Denoise(geometry)
        return {
            "text_encoder": TextEncoder(),
            "vae_encoder": EncodeImage(),
            "denoise.denoise": denoise,
            "decode.frames": DecodeFrames(),
            "decode.sound": DecodeSound(geometry.audio_bins),
        }, denoise


MODEL = LTX2Model()

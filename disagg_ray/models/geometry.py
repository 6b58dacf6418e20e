"""How large the tensors between stages are: numbers of a checkpoint's configurations, without a weight."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Geometry:
    """The numbers of a checkpoint that decide the sizes of tensors between stages; a family adds its own."""

    text_dim: int
    """Width of a text embedding."""
    max_sequence_length: int
    """Tokens of a text embedding."""
    latent_channels: int
    spatial_factor: int
    """Pixels a latent spans, in height and in width."""
    temporal_factor: int
    """Frames a latent spans."""
    two_transformers: bool = field(default=False, kw_only=True)
    boundary_ratio: float | None = field(default=None, kw_only=True)
    """Share of the timesteps below which the second of two transformers takes over."""

    def latents_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of finished latents, which are float32."""
        times = (num_frames - 1) // self.temporal_factor + 1
        return (1, self.latent_channels, times, height // self.spatial_factor, width // self.spatial_factor)

    def tensor_shapes(self, height: int, width: int, num_frames: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that may pass between stages, but for the request's images and tiles."""
        return {
            "prompt_embeds": (1, self.max_sequence_length, self.text_dim),
            "latents": self.latents_shape(height, width, num_frames),
        }

    def tensor_bytes(self, pixels: int, num_frames: int, image_pixels: int, num_parts: int = 0) -> dict[str, int]:
        """Return an upper bound (4 bytes an element, images 1) of every tensor that may pass between stages.

        `pixels` is height x width of what is made; `image_pixels` that of the larger conditioning image as given;
        `num_parts` share the tiles of a decode.
        """
        prompt = 4 * self.max_sequence_length * self.text_dim
        return {
            "prompt_embeds": prompt,
            "negative_prompt_embeds": prompt,
            "latents": 4 * self.latent_channels * self._num_latents(pixels, num_frames),
            "image": 3 * image_pixels,
            "last_image": 3 * image_pixels,
        }

    def _num_latents(self, pixels: int, num_frames: int) -> int:
        return pixels // self.spatial_factor**2 * ((num_frames - 1) // self.temporal_factor + 1)

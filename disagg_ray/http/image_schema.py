"""Bodies and answers of OpenAI's images API; what of its fields has no meaning here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from disagg_ray.http.schema import ApiError, ImageReference, Number, Text, Whole
from disagg_ray.text import shown

Word = Annotated[str, StringConstraints(max_length=1000)]
OTHERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one image a request is made; send a request for each, with another seed"),
    "quality": (("auto",), "leave it out; num_inference_steps decides it"),
    "background": (("auto", "opaque"), "leave it out; images have no transparent parts"),
    "moderation": (("auto", "low"), "leave it out; nothing is moderated"),
    "style": ((), "leave it out; say it in the prompt"),
    "input_fidelity": ((), "leave it out; say in the prompt what is to stay"),
    "output_compression": ((), "leave it out; webp is lossless, and jpeg has quality 95"),
    "stream": ((False,), "leave it out; POST /v1/videos and GET /v1/videos/{id}/events stream progress"),
    "partial_images": ((0,), "leave it out; POST /v1/videos and GET /v1/videos/{id}/events stream progress"),
}
"""Fields of OpenAI's of which only some values can be served, and what to do about the others."""


class CreateImage(BaseModel):
    """An image to generate. What is left out is the model's default."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    """What the image shows."""
    model: str | None = None
    """Name of the service; may be left out where there is one."""
    size: Annotated[str, StringConstraints(max_length=20)] | None = None
    """Width x height, as 1328x1328; auto is the model's default, or the size of the image that is edited."""
    response_format: Literal["b64_json", "url"] | None = None
    """b64_json, or the URL of the content, which takes the same key."""
    output_format: Literal["png", "webp", "jpeg"] | None = None
    """Of the image; png where it is left out."""
    negative_prompt: Text | None = None
    """What guidance steers away from."""
    num_inference_steps: Whole | None = None
    """Denoising steps."""
    guidance_scale: Number | None = None
    """Classifier-free guidance."""
    seed: Whole | None = None
    """Of the initial noise."""
    priority: Whole = 0
    """Higher goes first."""
    deadline_s: Annotated[Number, Field(gt=0, le=1e9)] | None = None
    """Seconds after it was accepted in which it must finish."""
    user: Word | None = None
    """Taken and not kept."""
    safety_identifier: Word | None = None
    """Taken and not kept."""
    n: Whole | None = None
    """1."""
    quality: Word | None = None
    """auto."""
    background: Word | None = None
    """auto or opaque."""
    moderation: Word | None = None
    """auto or low: nothing is moderated."""
    style: Word | None = None
    """Refused."""
    output_compression: Whole | None = None
    """Refused."""
    stream: bool | None = None
    """false."""
    partial_images: Whole | None = None
    """0."""


class EditImage(CreateImage):
    """An image to make of others."""

    image: Annotated[list[ImageReference], Field(min_length=1, max_length=64)] | None = None
    """What is edited; in a form, one part for each."""
    mask: ImageReference | None = None
    """Refused where the model takes none."""
    input_fidelity: Word | None = None
    """Refused."""


class Image(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """A finished image."""

    id: str
    """Of its job, which `GET /v1/videos/{id}` describes, seed and all."""
    created: int
    data: list[Image]
    size: str
    output_format: Literal["png", "webp", "jpeg"]
    background: Literal["opaque"] = "opaque"


def refuse_others(body: CreateImage) -> None:
    """Refuse values that cannot be served.

    Raises:
        ApiError: names the field, the value and the remedy.
    """
    for name, (known, remedy) in OTHERS.items():
        value = getattr(body, name, None)
        if value is not None and value not in known:
            raise ApiError(400, f"{name}: {shown(value)} is not served; {remedy}", param=name, code="unsupported_value")

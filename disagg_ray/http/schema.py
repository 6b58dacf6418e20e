"""What the HTTP service takes and answers: OpenAI's field names, and our own beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from disagg_ray.http.store import Job
from disagg_ray.inputs import OTHERS
from disagg_ray.text import did_you_mean, printable


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
Whole = Annotated[int, BeforeValidator(_no_bool)]


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must hold no NUL character")  # PostgreSQL takes none
    return text


Text = Annotated[str, StringConstraints(max_length=100_000), AfterValidator(_no_nul)]


class ApiError(Exception):
    """An answer other than success, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def to_json(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": _type_of(self.status), "param": self.param, "code": self.code}
        }


def _type_of(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class ImageReference(BaseModel):
    """An image in a JSON body."""

    model_config = ConfigDict(extra="forbid")
    image_url: str
    """A data URL, as data:image/png;base64,..."""

    @property
    def url(self) -> str:
        return self.image_url


class VideoReference(BaseModel):
    """A video in a JSON body."""

    model_config = ConfigDict(extra="forbid")
    video_url: str
    """A data URL, as data:video/mp4;base64,..."""

    @property
    def url(self) -> str:
        return self.video_url


class CreateVideo(BaseModel):
    """A video or an image to generate. What is left out is the model's default."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    """What to show."""
    model: str | None = None
    """Name of the service; may be left out where there is one."""
    seconds: Annotated[str, StringConstraints(max_length=20)] | Number | None = None
    """Length of the video; the nearest number of frames that the model makes. Not of an image."""
    size: Annotated[str, StringConstraints(max_length=20)] | None = None
    """Width x height, as 832x480."""
    format: Annotated[str, StringConstraints(max_length=20)] | None = None
    """mp4; of an image png, webp or jpg."""
    input_reference: ImageReference | None = None
    """First frame, or what is edited, of a model that takes one."""
    last_image: ImageReference | None = None
    """Last frame, of a model that takes one."""
    video: VideoReference | None = None
    """Control video, of a model that takes one: an mp4, gif or webp file."""
    mask: ImageReference | VideoReference | None = None
    """Of the video, black where it stays: one image, or a video of as many frames."""
    reference_images: Annotated[list[ImageReference], Field(min_length=1, max_length=64)] | None = None
    """What is to appear or is edited, of a model that takes such images; in a form, one part for each."""
    conditioning_scale: Number | None = None
    """How much video and reference images count."""
    modality_scale: Number | None = None
    """Of a model with sound: how far video is steered away from what it were without its sound; 1 is not at all."""
    audio_modality_scale: Number | None = None
    """The same of sound and its video."""
    stg_scale: Number | None = None
    """Of a model with sound: how far video is steered away from what it were if one block did not attend."""
    audio_stg_scale: Number | None = None
    """The same of sound."""
    stg_block: Whole | None = None
    """Number of that block, from 0."""
    guidance_rescale: Number | None = None
    """Of a model with sound: share of the guided prediction that gets the unguided one's deviation."""
    audio_guidance_rescale: Number | None = None
    """The same of sound."""
    negative_prompt: Text | None = None
    """What guidance steers away from."""
    num_inference_steps: Whole | None = None
    """Denoising steps."""
    guidance_scale: Number | None = None
    """Classifier-free guidance, of the high-noise transformer where there are two."""
    guidance_scale_2: Number | None = None
    """Of the low-noise transformer."""
    audio_guidance_scale: Number | None = None
    """Of the sound, of a model that makes some."""
    seed: Whole | None = None
    """Of the initial noise."""
    num_frames: Whole | None = None
    """Frames, 4k + 1, in place of seconds; not of an image."""
    fps: Whole | None = None
    """Frames a second; not of an image."""
    priority: Whole = 0
    """Higher goes first."""
    deadline_s: Annotated[Number, Field(gt=0, le=1e9)] | None = None
    """Seconds after it was accepted in which a job must finish; later it fails."""


class RemixVideo(BaseModel):
    """A new prompt for the settings of another job."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text


class StageProgress(BaseModel):
    """How far a stage of a job is."""

    stage: str
    state: Literal["waiting", "pulling", "running", "publishing", "done", "failed", "cancelled"]
    step: int
    steps: int
    """0: it has no steps."""
    share: float
    """Of the job's predicted seconds."""


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job, as OpenAI's of a video, with our settings and stages."""

    id: str
    object: Literal["video", "image"]
    """What it makes."""
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelling", "cancelled"]
    progress: int
    """Per cent."""
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    """Of the video; 0 of an image."""
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    settings: dict[str, Any] = {}
    """Seed, format and all else that it was made with."""
    images: list[str] = []
    """Fields in which a file was given."""
    stages: list[StageProgress] = []
    """While it runs."""
    queue_position: int | None = None
    """Jobs of the model before this one, while it waits."""
    wait_s: float | None = None
    """Predicted seconds until it is finished, once other jobs have shown how long one takes."""


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted", "image.deleted"]
    deleted: bool = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "disagg_ray"
    task: str
    makes: Literal["video", "image"]
    defaults: dict[str, Any]
    limits: dict[str, Any]
    multiple: int
    """Of which width and height are multiples, in pixels."""
    files: list[str]
    """Fields of a body that are files which it takes."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


SHOWN = ("format", "seed", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2",
         "audio_guidance_scale", "negative_prompt", "priority")  # fmt: skip


def to_video(job: Job, **more: Any) -> Video:
    error = None
    if job.error_code is not None:
        error = VideoError(code=job.error_code, message=job.error_message or "")
    return Video(
        id=job.id, object=job.makes, model=job.model, status=job.status,  # type: ignore[arg-type] # deleted ones are never shown
        progress=job.progress, created_at=int(job.created_at),
        completed_at=_whole(job.completed_at), expires_at=_whole(job.expires_at),
        prompt=job.prompt, size=job.size, seconds=job.seconds, remixed_from_video_id=job.remixed_from, error=error,
        settings={name: job.settings[name] for name in (*SHOWN, *OTHERS) if name in job.settings},
        images=sorted({place.partition("[")[0] for place in job.images}), **more,
    )  # fmt: skip


def _whole(seconds: float | None) -> int | None:
    return int(seconds) if seconds is not None else None


def explain(error: ValidationError, known: type[BaseModel]) -> ApiError:
    """Return the answer to a body that is none: its first fault, by field."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith(("constrained", "function-"))]
    param = printable(place[0]) if place else None
    if first["type"] == "missing":
        message = f"{param}: missing; it is required"
    elif first["type"] == "extra_forbidden" and len(place) == 1:
        message = f"{param}: unknown field{did_you_mean(place[0], known.model_fields)}"
    elif param is None:
        message = f"body: {first['msg']}; give a JSON object or a form"
    else:
        message = f"{param}: {printable(str(first['input']), 80)!r}: {first['msg']}"
    return ApiError(400, message, param=param, code="unknown_parameter" if "unknown field" in message else None)

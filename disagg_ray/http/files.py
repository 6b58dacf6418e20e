"""Files of an HTTP service: videos, images, thumbnails and uploads, in a folder or at a URL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from disagg_ray.errors import OutputError
from disagg_ray.http.store import Job
from disagg_ray.media import storage
from disagg_ray.media.output import atomic_file
from disagg_ray.media.places import check_output, is_url, local_path
from disagg_ray.media.video import make_thumbnail

MEDIA_TYPES = {"mp4": "video/mp4", "png": "image/png", "webp": "image/webp", "jpg": "image/jpeg"}
"""Of the formats that are served."""


class Folder:
    """Files by name, each written whole or not at all."""

    def __init__(self, place: str) -> None:
        """Check that files can be written there.

        Raises:
            OutputError: they cannot.
        """
        self._place = place.rstrip("/") if is_url(place) else str(local_path(place))
        try:
            check_output(self._path("probe.mp4"), overwrite=True)
        except OutputError as error:
            raise OutputError(f"service.folder: {str(error).removeprefix('output: ')}") from error
        if not is_url(self._place):
            Path(self._place).mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._place}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Write a file.

        Raises:
            OutputError: the place does not take it.
        """
        if is_url(self._place):
            storage.write(self._path(name), lambda sink: sink.writelines([data]))
            return
        try:
            with atomic_file(Path(self._path(name))) as sink:
                sink.write(data)
        except OSError as error:
            said = f"service.folder: {name} cannot be written: {error.strerror}"
            raise OutputError(f"{said}; make room, or have service.max_bytes bound it") from error

    def add_thumbnail(self, job: Job) -> None:
        """Write what a job made beside it as a WebP file, of a video the first frame, unless it is there."""
        made, thumbnail = file_of(job), thumbnail_of(job)
        if not storage.exists(self._path(thumbnail)):
            data = b"".join(self.read(made, 0, self.size(made)))
            self.write(thumbnail, make_thumbnail(data, job.settings["format"]))

    def size(self, name: str) -> int:
        return storage.size(self._path(name))

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        return storage.read(self._path(name), start, stop)

    def remove(self, *names: str) -> None:
        """Remove files, those that there are."""
        for name in names:
            storage.remove(self._path(name))

    def remove_all_of(self, job: Job) -> None:
        """Remove what a job made and what was sent for it."""
        self.remove(file_of(job), thumbnail_of(job), *job.images.values())

    @contextmanager
    def local(self, names: Mapping[str, str]) -> Iterator[dict[str, Path]]:
        """Give paths of this machine to files, by their places in a request."""
        with ExitStack() as stack:
            if not is_url(self._place):
                yield {place: Path(self._path(name)) for place, name in names.items()}
                return
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disagg_ray-")))
            for name in names.values():
                (folder / name).write_bytes(b"".join(self.read(name, 0, self.size(name))))
            yield {place: folder / name for place, name in names.items()}


def file_of(job: Job) -> str:
    """Return the name of what a job makes."""
    return f"{job.id}.{job.settings['format']}"


def thumbnail_of(job: Job) -> str:
    return f"{job.id}.thumbnail.webp"


def name_of(job_id: str, place: str) -> str:
    """Return the name of an upload, by its place in the request; without brackets, which are patterns at some URLs."""
    return f"{job_id}.{place.replace('[', '.').rstrip(']')}"


def by_field(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return files by the request's fields, from those by place; `field[0]`, `field[1]` and so on make a list."""
    fields: dict[str, Any] = {}
    for place in sorted(files, key=lambda place: (len(place), place)):
        field, bracket, _ = place.partition("[")
        if bracket:
            fields.setdefault(field, []).append(files[place])
        else:
            fields[field] = files[place]
    return fields

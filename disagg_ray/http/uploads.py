"""Uploads until their job has a row: a process that dies while it accepts one leaves none for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from disagg_ray.errors import OutputError
from disagg_ray.http.clock import steady_now
from disagg_ray.http.files import Folder
from disagg_ray.http.schema import ApiError
from disagg_ray.http.store import DAY_S, UPLOADS, Accepting, Job, Store

MOST_S = DAY_S
"""From noting uploads to accepting their job. What takes longer is refused, so that no process, however slow or with a
clock however wrong, removes files of an accepted job."""
GIVEN_UP = 0.0


class Uploads:
    """Notes in the database what is written before a job is accepted. A folder's list would not tell whose files
    are there: services with several databases may share it."""

    def __init__(self, store: Store, folder: Folder) -> None:
        self._store, self._folder = store, folder
        self._doubtful = set[str]()
        """Jobs that the database failed to accept: a connection that broke may have written the row all the same."""

    @contextmanager
    def noted(self, job: Job) -> Iterator[None]:
        """Have a job's uploads noted while they are written and it is accepted; remove those of one that is refused."""
        if not job.images:
            yield
            return
        note = {"job_id": job.id, "names": list(job.images.values()), "noted_at": steady_now()}
        with self._store.writing() as connection:
            connection.execute(sa.insert(UPLOADS).values(**note))
        try:
            yield
        except (ApiError, OutputError):
            self.drop(job)
            raise
        except SQLAlchemyError:
            self._doubtful.add(job.id)
            raise

    def take(self, accepting: Accepting, job: Job) -> None:
        """Forget the note of a job that is being accepted: its row names its uploads from now on.

        Raises:
            ApiError: it was given up.
        """
        if not job.images:
            return
        kept = sa.delete(UPLOADS).where(UPLOADS.c.job_id == job.id, UPLOADS.c.noted_at > GIVEN_UP)
        if accepting.connection.execute(kept).rowcount != 1:
            message = f"service.folder: it took over {MOST_S:g} s to write the files; try again"
            raise ApiError(503, message, code="storage_failed")

    def drop(self, job: Job) -> None:
        """Remove uploads of a job that is not accepted."""
        self._remove(job.id, list(job.images.values()))

    def left(self) -> list[str]:
        """Return the jobs of which uploads are to be removed unless they have been accepted."""
        late = sa.select(UPLOADS.c.job_id).where(UPLOADS.c.noted_at <= steady_now() - MOST_S)
        return [*self._doubtful, *self._store.column(late)]

    def give_up(self, job_id: str) -> None:
        """Have a job accepted no more, and remove its uploads, unless it has been accepted."""
        of_job = UPLOADS.c.job_id == job_id
        with self._store.writing() as connection:
            connection.execute(sa.update(UPLOADS).where(of_job).values(noted_at=GIVEN_UP))
            names = connection.execute(sa.select(UPLOADS.c.names).where(of_job)).scalar()
        if names is not None:
            self._remove(job_id, names)
        self._doubtful.discard(job_id)

    def _remove(self, job_id: str, names: list[str]) -> None:
        self._folder.remove(*names)  # first: what fails is tried again; a full disk gets room for the row
        with self._store.writing() as connection:
            connection.execute(sa.delete(UPLOADS).where(UPLOADS.c.job_id == job_id))

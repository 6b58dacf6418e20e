"""Jobs in a database: SQLite for processes of one machine, PostgreSQL for several."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from disagg_ray.config.traits import FORMATS
from disagg_ray.http.database import opening
from disagg_ray.http.workers import LOCKS, Workers

Status = Literal["queued", "in_progress", "cancelling", "completed", "failed", "cancelled", "deleted"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress", "cancelling")
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled")
DAY_S = 86400.0


@dataclass(frozen=True)
class Job:
    """One accepted video or image, as the database has it; times are seconds since the epoch."""

    id: str
    tenant: str
    """Name of the key it was asked for with; empty: there are no keys."""
    model: str
    worker: int
    """Number of the process that runs it (`Workers`)."""
    prompt: str
    settings: dict[str, Any]
    """Fields of the request beside the prompt, resolved: the same video comes of them whenever it is made."""
    images: dict[str, str]
    """Uploads in the folder by their places in the request, as `image` and `reference_images[0]`."""
    size: str
    """As 832x480."""
    seconds: str
    """Of the video, as it was asked for."""
    created_at: float
    length_s: float = 0.0
    """Of the video, as it is made; an image has none."""
    status: Status = "queued"
    progress: int = 0
    completed_at: float | None = None
    deadline_at: float | None = None
    expires_at: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    remixed_from: str | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""
    """Digest of the body, to distinguish a repeated POST from another one under its key."""
    num_bytes: int = 0
    """Of its files: uploads, and the finished video; 0 once they are removed."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """What each stage took."""
    stages: dict[str, list[Any]] = field(default_factory=dict)
    """How far each stage is while the job runs: the state, step and number of steps of its latest event."""

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED

    @property
    def makes(self) -> Literal["video", "image"]:
        return "image" if self.settings["format"] in FORMATS["image"] else "video"


COLUMN_TYPES: dict[str, Any] = {
    "str": sa.Text, "str | None": sa.Text, "int": sa.BigInteger, "float": sa.Double, "float | None": sa.Double,
    "Status": sa.Text, "dict[str, Any]": sa.JSON, "dict[str, str]": sa.JSON, "dict[str, float]": sa.JSON,
    "dict[str, list[Any]]": sa.JSON,
}  # fmt: skip
METADATA = sa.MetaData()
JOBS = sa.Table(
    "jobs",
    METADATA,
    *(
        sa.Column(f.name, COLUMN_TYPES[str(f.type)], primary_key=f.name == "id", nullable=str(f.type).endswith("None"))
        for f in fields(Job)
    ),
    sa.Index("jobs_by_tenant", "tenant", "created_at", "id"),
    sa.Index("jobs_by_status", "status"),
    sa.UniqueConstraint("tenant", "idempotency_key"),
)
UPLOADS = sa.Table(
    "uploads",
    METADATA,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("names", sa.JSON, nullable=False),
    sa.Column("noted_at", sa.Double, nullable=False),
)
"""Files of jobs that are being accepted, by `Uploads`."""

GET = sa.select(JOBS).where(
    JOBS.c.id == sa.bindparam("job_id"), JOBS.c.status != "deleted",
    sa.or_(sa.bindparam("tenant_or_none", type_=sa.Text).is_(None), JOBS.c.tenant == sa.bindparam("tenant_or_none")),
)  # fmt: skip
"""Made once: to write it down anew takes longer than to run it."""


class Store:
    """Reads and writes jobs, from any thread."""

    def __init__(self, url: str) -> None:
        """Open the database; create its table if it has none.

        Raises:
            ConfigError: the URL is none, or the database cannot be reached.
        """
        with opening(url) as self._engine:
            self._is_sqlite = self._engine.dialect.name == "sqlite"
            self._turn = threading.Lock() if self._is_sqlite else nullcontext()
            """Of threads that write: they would wait longer for SQLite, which looks again after up to 0.1 s."""
            self._create_table()
        self.workers = Workers(self._engine)

    def _create_table(self) -> None:
        """Create the table unless it is there; of several processes, one after the other."""
        with self.writing() as connection:
            if not self._is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCKS)))
            METADATA.create_all(connection)

    def close(self) -> None:
        """Give back worker numbers and connections."""
        self.workers.close()
        self._engine.dispose()

    @property
    def is_quick(self) -> bool:
        """Whether a row is read in this process, waiting for no other: an event loop may, without a thread."""
        return self._is_sqlite

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give a transaction that writes."""
        with self._turn, self._engine.execution_options(immediate=True).begin() as connection:
            yield connection

    def get(self, job_id: str, tenant: str | None = None) -> Job | None:
        """Return a job, of a tenant if one is given; deleted ones are not there."""
        if "\0" in job_id:  # of which PostgreSQL would say that it is no text
            return None
        with self._engine.connect() as connection:
            row = connection.execute(GET, {"job_id": job_id, "tenant_or_none": tenant}).first()
        return Job(*row) if row is not None else None

    def cursor(self, job_id: str, tenant: str) -> Job | None:
        """Return a job of a tenant after which a page goes on: also one that was deleted within a day."""
        if "\0" in job_id:
            return None
        found = self._select(sa.select(JOBS).where(JOBS.c.id == job_id, JOBS.c.tenant == tenant))
        return found[0] if found else None

    def page(self, tenant: str, after: Job | None, limit: int, *, ascending: bool) -> list[Job]:
        """Return a tenant's jobs in order of their making, from after one."""
        order = (JOBS.c.created_at, JOBS.c.id)
        query = sa.select(JOBS).where(JOBS.c.tenant == tenant, JOBS.c.status != "deleted").limit(limit)
        if after is not None:
            key, place = sa.tuple_(*order), sa.tuple_(sa.literal(after.created_at), sa.literal(after.id))
            query = query.where(key > place if ascending else key < place)
        return self._select(query.order_by(*(c.asc() if ascending else c.desc() for c in order)))

    def unfinished(self) -> list[Job]:
        """Return all jobs that wait or run, in the order in which they are to run."""
        jobs = self._select(sa.select(JOBS).where(JOBS.c.status.in_(UNFINISHED)))
        return sorted(jobs, key=lambda job: (-job.settings["priority"], job.created_at))

    def last_completed(self, model: str) -> Job | None:
        """Return the job that was completed last: what its stages took predicts the next."""
        query = sa.select(JOBS).where(JOBS.c.model == model, JOBS.c.status == "completed")
        jobs = self._select(query.order_by(JOBS.c.completed_at.desc()).limit(1))
        return jobs[0] if jobs else None

    def by_idempotency_key(self, tenant: str, key: str) -> Job | None:
        with self._engine.connect() as connection:
            return Accepting(connection, tenant).find(key)

    @contextmanager
    def accepting(self, tenant: str) -> Iterator[Accepting]:
        """Give what counts a tenant's jobs and adds one, no other of any process coming between.

        Ask for nothing else of the database meanwhile: those who wait for this hold all its connections.
        """
        with self.writing() as connection:
            if not self._is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCKS)))
            yield Accepting(connection, tenant)

    def change(self, job_id: str, before: Sequence[Status], **values: Any) -> bool:
        """Set columns of a job that has one of these statuses; return whether it had."""
        return self.change_all({job_id: values}, before) == 1

    def delete(self, job_id: str) -> bool:
        """Mark a job as deleted, and forget what was asked for; its row counts for the limits of a day, and pages."""
        gone: dict[str, Any] = {"prompt": "", "images": {}, "idempotency_key": None, "num_bytes": 0}
        return self.change(job_id, (*UNFINISHED, *ENDED), status="deleted", completed_at=time.time(), **gone)

    def change_all(self, values: Mapping[str, Mapping[str, Any]], before: Sequence[Status]) -> int:
        """Set columns of several jobs at once, of those that have one of these statuses; return how many had."""
        with self.writing() as connection:
            return sum(
                connection.execute(
                    sa.update(JOBS).where(JOBS.c.id == job_id, JOBS.c.status.in_(before)).values(**columns)
                ).rowcount
                for job_id, columns in values.items()
            )

    def expired(self, now: float, max_bytes: int | None) -> list[Job]:
        """Return jobs that have ended, whose files are to go: past their time, and the oldest of too many bytes."""
        ended = JOBS.c.status.in_(ENDED)
        query = sa.select(JOBS).where(ended, JOBS.c.num_bytes > 0)
        late = self._select(query.where(JOBS.c.expires_at <= now))
        if max_bytes is None:
            return late
        total, excess = sa.func.sum(JOBS.c.num_bytes), list[Job]()
        with self._engine.connect() as connection:
            held = connection.execute(sa.select(total).where(ended)).scalar() or 0
        if held > max_bytes:
            for job in self._select(query.order_by(JOBS.c.completed_at)):
                if held <= max_bytes:
                    break
                excess.append(job)
                held -= job.num_bytes
        return late + [job for job in excess if job not in late]

    def forget_deleted(self, now: float) -> None:
        """Remove rows of jobs that were deleted over a day ago."""
        with self.writing() as connection:
            connection.execute(sa.delete(JOBS).where(JOBS.c.status == "deleted", JOBS.c.completed_at < now - DAY_S))

    def check(self) -> None:
        """Raise `SQLAlchemyError` unless the database answers."""
        with self._engine.connect() as connection:
            connection.execute(sa.select(1))

    def column(self, query: sa.Select[Any]) -> list[Any]:
        """Return the first column of what a query finds."""
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def _select(self, query: sa.Select[Any]) -> list[Job]:
        with self._engine.connect() as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]


@dataclass
class Accepting:
    """A transaction in which a job is accepted."""

    connection: Connection
    tenant: str

    def count(self, model: str) -> int:
        """Return how many jobs of a model are unfinished, of all tenants."""
        query = sa.select(sa.func.count()).where(JOBS.c.model == model, JOBS.c.status.in_(UNFINISHED))
        return int(self.connection.execute(query).scalar() or 0)

    def in_flight(self) -> int:
        """Return how many jobs of the tenant are unfinished."""
        query = sa.select(sa.func.count()).where(JOBS.c.tenant == self.tenant, JOBS.c.status.in_(UNFINISHED))
        return int(self.connection.execute(query).scalar() or 0)

    def seconds_today(self) -> float:
        """Return the seconds of video that were accepted of the tenant within a day."""
        return float(self._today(sa.func.sum(JOBS.c.length_s)))

    def images_today(self) -> int:
        """Return how many images were accepted of the tenant within a day."""
        return int(self._today(sa.func.count(), JOBS.c.length_s == 0.0))

    def _today(self, what: sa.ColumnElement[Any], *which: sa.ColumnElement[bool]) -> Any:
        """Return an aggregate over the tenant's jobs of a day; 0 over none.

        Those that failed are left out, also since they were deleted: their error stays.
        """
        since = time.time() - DAY_S
        query = sa.select(what).where(
            JOBS.c.tenant == self.tenant, JOBS.c.created_at > since, JOBS.c.error_code.is_(None), *which
        )
        return self.connection.execute(query).scalar() or 0

    def find(self, idempotency_key: str) -> Job | None:
        query = sa.select(JOBS).where(JOBS.c.tenant == self.tenant, JOBS.c.idempotency_key == idempotency_key)
        row = self.connection.execute(query).first()
        return Job(**row._mapping) if row is not None else None

    def add(self, job: Job) -> None:
        self.connection.execute(sa.insert(JOBS).values(**asdict(job)))

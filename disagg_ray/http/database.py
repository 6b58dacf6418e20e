"""Opens the jobs' database: SQLite for processes of one machine, PostgreSQL for several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from disagg_ray.errors import ConfigError
from disagg_ray.text import mask, printable

BUSY_S = 30.0
"""How long SQLite waits for another process that writes."""


@contextmanager
def opening(url: str) -> Iterator[Engine]:
    """Give the engine of a database, for its first use.

    Raises:
        ConfigError: the URL is none, or the database cannot be reached or written.
    """
    try:
        is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
        engine = sa.create_engine(url, pool_pre_ping=not is_sqlite)
        if is_sqlite:
            Path(engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)
            _set_up_sqlite(engine)
        yield engine
    except (sa.exc.SQLAlchemyError, OSError, ImportError) as error:
        said = printable(str(error).partition("\n")[0])
        raise ConfigError(
            f"invalid service.database={mask(url)!r}: {said}; must be a URL such as sqlite:////path/jobs.db or "
            f"postgresql://user@host/name, which can be reached and written"
        ) from error


def _set_up_sqlite(engine: Engine) -> None:
    """Have readers go on beside a writer, writers take turns, and what is committed be on disk."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # `begin` below begins
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={1000 * BUSY_S:.0f}"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("immediate", False):  # a query alone needs no transaction
            connection.exec_driver_sql("BEGIN IMMEDIATE")

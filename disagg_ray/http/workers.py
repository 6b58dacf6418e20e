"""Worker numbers: each live process holds one; the process that takes a dead one's number runs its jobs."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

UNAVAILABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
"""What is raised while the database does not answer."""
MAX_WORKERS = 1000
LOCKS = 0x64726179
"""PostgreSQL's class of our advisory locks."""
KEEPALIVE = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 4}
"""PostgreSQL frees the locks of a machine that is gone after half a minute in place of two hours."""


class Workers:
    """Numbers of this process, each a lock that goes with it: on a file beside SQLite's, or in PostgreSQL."""

    def __init__(self, engine: Engine) -> None:
        self.own = -1
        """The number under which this process accepts jobs."""
        self.numbers = set[int]()
        """That one, and those that were taken over."""
        self._engine, self._is_sqlite = engine, engine.dialect.name == "sqlite"
        self._files = list[IO[str]]()
        self._session: Connection | None = None
        """PostgreSQL's, which holds the locks."""

    def close(self) -> None:
        """Give the numbers back."""
        for file in self._files:
            file.close()
        self._end_session()

    def become_one(self) -> None:
        """Take the first number that is free as our own."""
        self.own = next(number for number in range(MAX_WORKERS) if self.take(number))

    def take(self, number: int) -> bool:
        """Take a number unless another living process has it; return whether it is ours."""
        if number not in self.numbers and (self._lock_file(number) if self._is_sqlite else self._lock(number)):
            self.numbers.add(number)
        return number in self.numbers

    def keep(self) -> None:
        """Take numbers again that went with the connection to PostgreSQL; other processes may have some of them now."""
        if self._is_held():
            return
        held, self.numbers = self.numbers, set()
        for number in held:
            self.take(number)
        if self.own not in self.numbers:
            self.become_one()

    def _is_held(self) -> bool:
        if self._session is None:
            return self._is_sqlite
        try:
            self._session.execute(sa.select(1))
        except UNAVAILABLE:
            self._end_session()
            return False
        return True

    def _lock_file(self, number: int) -> bool:
        file = Path(f"{self._engine.url.database}.worker{number}").open("w")  # noqa: SIM115 - held until `close`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._files.append(file)
        return True

    def _lock(self, number: int) -> bool:
        if self._session is None:
            session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            session.detach()  # from the pool, which would keep it, and its locks, for others
            for setting, value in KEEPALIVE.items():
                session.exec_driver_sql(f"SET {setting} = {value}")
            self._session = session
        return bool(self._session.execute(sa.select(sa.func.pg_try_advisory_lock(LOCKS, number))).scalar())

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

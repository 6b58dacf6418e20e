"""A PostgreSQL of our own, which tests may stop and start again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import helpers
import pytest

PLACES = (Path("/usr/lib/postgresql"), Path(".venv/postgresql/usr/lib/postgresql"))


class Postgres:
    """A server in a folder; nobody but this machine reaches it."""

    def __init__(self, programs: Path, folder: str) -> None:
        self._programs, self._folder, self._port = programs.absolute(), folder, helpers.free_port()
        self._user = "postgres" if os.geteuid() == 0 else None
        self.url = f"postgresql://jobs@127.0.0.1:{self._port}/postgres"
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "-U", "jobs", "--auth=trust", "--no-sync")

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-w", "-o", options, "-l", f"{self._folder}/log", "start")

    def stop(self) -> None:
        """Stop it as a crash does: what was committed is on disk."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [f"{self._programs}/{program}", "-D", f"{self._folder}/data", *arguments]
        subprocess.run(command, check=True, user=self._user, stdout=subprocess.DEVNULL, timeout=120, cwd=self._folder)


@contextmanager
def running() -> Iterator[Postgres]:
    found = [folder for place in PLACES for folder in place.glob("*/bin")]
    if not found:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    with TemporaryDirectory(prefix="pg-") as folder:
        server = Postgres(found[0], folder)
        server.start()
        yield server
        server.stop()

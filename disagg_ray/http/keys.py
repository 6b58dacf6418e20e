"""Who may use an HTTP service: a file of keys' digests, with each one's limits."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from disagg_ray.errors import ConfigError, InputError, OutputError
from disagg_ray.http.schema import ApiError
from disagg_ray.media.locks import locked
from disagg_ray.media.output import atomic_file
from disagg_ray.request import MAX_PRIORITY
from disagg_ray.text import find_repeated, shown

PREFIX = "sk-"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
DIGEST = re.compile(r"[0-9a-f]{64}")
SESSION = "local"
"""Name of the key that `disagg-ray serve` prints."""
SERVICE_KEY = "service.api_keys"
LIMITS = {
    "max_in_flight": "--in-flight", "seconds_a_day": "--seconds-a-day", "images_a_day": "--images-a-day",
    "priority": "--priority",
}  # fmt: skip
"""Fields of a key, and what gives them on the command line."""
WAIT_S = 10.0
"""For another process that changes the same file."""


@dataclass(frozen=True)
class Key:
    """A tenant: what is asked for with one key is seen with it alone."""

    name: str
    sha256: str = ""
    """Digest of the key, which is 256 random bits: no salt or slow hash makes it safer."""
    max_in_flight: int | None = None
    """Most unfinished jobs at once; None: no limit."""
    seconds_a_day: float | None = None
    """Most seconds of video within a day; None: no limit."""
    images_a_day: int | None = None
    """Most images within a day; None: no limit."""
    priority: int = 0
    """Added to that of its requests."""


EVERYBODY = Key("")
"""The tenant where there are no keys."""


class Keys:
    """Those of a file, read again whenever it changes."""

    def __init__(self, file: str | None, session_key: str | None) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, or holds something else.
        """
        self._file = Path(file) if file is not None else None
        self._session = [Key(SESSION, session_key)] if session_key is not None else []
        self._read: tuple[tuple[int, ...] | None, list[Key]] = None, []
        self._current()

    @property
    def are_on(self) -> bool:
        return self._file is not None

    def find(self, key: str) -> Key | None:
        """Return whose key it is, comparing with every one in the same time."""
        digest, found = digest_of(key), None
        for known in self._current():
            if hmac.compare_digest(known.sha256, digest):
                found = known
        return found

    def authenticate(self, authorization: str | None) -> Key:
        """Return whose request it is, from its Authorization header.

        Raises:
            ApiError: there are keys, and it has none of them.
        """
        if not self.are_on:
            return EVERYBODY
        kind, _, secret = (authorization or "").partition(" ")
        key = self.find(secret.strip()) if kind.lower() == "bearer" and secret else None
        if key is None:
            message = "Authorization: no valid key; give `Authorization: Bearer sk-...`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return key

    def _current(self) -> list[Key]:
        if self._file is None:
            return []
        state = _state_of(self._file)
        if state is None or self._read[0] != state:
            self._read = state, read_keys(self._file)
        return self._read[1] + self._session


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(file: Path, given: str = SERVICE_KEY) -> list[Key]:
    """Return the keys of a file; none where there is no file. `given` is what names the file, for errors.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    invalid = f"invalid {given}={shown(str(file))}"
    remedy = "must be a file that `disagg-ray keys add` wrote"
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for without end
            raise ConfigError(f"{invalid}: it is no regular file; {remedy}")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{invalid}: it cannot be read: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{invalid}: it is not UTF-8: {error}; {remedy}") from error
    try:
        return _parse(json.loads(text))
    except RecursionError as error:
        raise ConfigError(f"{invalid}: it is nested too deeply; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{invalid}: {error}; {remedy}") from error


def _parse(entries: object) -> list[Key]:
    """Raises ValueError: they are no list of keys; says why."""
    if not isinstance(entries, list):
        raise ValueError("it holds no list")
    known = {f.name for f in fields(Key)}
    for entry in entries:
        if not (isinstance(entry, dict) and {"name", "sha256"} <= entry.keys() <= known):
            raise ValueError(f"{shown(entry)} is no key")
        if wrong := _find_wrong(Key(**entry)):
            raise ValueError(f"{wrong[0]}={shown(entry.get(wrong[0]))}: {wrong[1]}")
    if (name := find_repeated(entry["name"] for entry in entries)) is not None:
        raise ValueError(f"several keys have the name {shown(name)}")
    return [Key(**entry) for entry in entries]


def _state_of(file: Path) -> tuple[int, ...] | None:
    """Return what differs once a file was replaced; None: it cannot be seen.

    Its time alone does not: two changes may come within a tick of the file system's clock.
    """
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _find_wrong(key: Key) -> tuple[str, str] | None:
    """Return the first field that is impossible, and what it must be; None: none is."""
    name, seconds = key.name, key.seconds_a_day
    rules: dict[str, tuple[bool, str]] = {
        "name": (
            isinstance(name, str) and NAME.fullmatch(name) is not None and name != SESSION,
            f"must be 1 to 40 of a-z, 0-9, - and _, the first a letter or digit, as alice, and not {SESSION}, which "
            f"is the key that `disagg-ray serve` prints",
        ),
        "sha256": (isinstance(key.sha256, str) and DIGEST.fullmatch(key.sha256) is not None, "must be a digest"),
        "max_in_flight": (_is_count(key.max_in_flight), "must be at least 1"),
        "images_a_day": (_is_count(key.images_a_day), "must be at least 1"),
        "seconds_a_day": (
            seconds is None or (type(seconds) in (int, float) and 0 < seconds < math.inf),
            "must be a positive number",
        ),
        "priority": (
            type(key.priority) is int and abs(key.priority) <= MAX_PRIORITY,
            f"must be from {-MAX_PRIORITY} to {MAX_PRIORITY}",
        ),
    }
    return next(((field, must) for field, (is_right, must) in rules.items() if not is_right), None)


def _is_count(most: object) -> bool:
    return most is None or (type(most) is int and most >= 1)


def add_key(file: Path, key: Key) -> str:
    """Add a key to a file, which only its owner may read; return the key, which is nowhere else.

    Raises:
        InputError: the name or a limit is impossible, there is a key of that name, or another process holds the file.
        OutputError: the file cannot be written.
    """
    made = new_key()
    key = replace(key, sha256=digest_of(made))
    if wrong := _find_wrong(key):
        raise InputError(f"invalid {LIMITS.get(wrong[0], 'NAME')}={shown(getattr(key, wrong[0]))}: {wrong[1]}")
    with _changing(file) as target:
        keys = read_keys(target, "--file")
        if key.name in {known.name for known in keys}:
            raise InputError(f"invalid NAME={shown(key.name)}: there is a key of this name; remove it, or give another")
        _write(target, [*keys, key])
    return made


def remove_key(file: Path, name: str) -> None:
    """Remove a key from a file.

    Raises:
        InputError: no key has that name, or another process holds the file.
        OutputError: the file cannot be written.
    """
    _check_known(name, read_keys(file, "--file"))  # before there is a lock, for which its folder may be made
    with _changing(file) as target:
        keys = read_keys(target, "--file")
        _check_known(name, keys)
        _write(target, [key for key in keys if key.name != name])


def _check_known(name: str, keys: list[Key]) -> None:
    known = [key.name for key in keys]
    if name not in known:
        raise InputError(f"invalid NAME={shown(name)}: there is no such key; there are: {', '.join(known) or 'none'}")


@contextmanager
def _changing(file: Path) -> Iterator[Path]:
    """Give a file, by its name without links, which no other `keys` changes meanwhile; what is made is its owner's."""
    target = Path(os.path.realpath(file))
    before = os.umask(0o077)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock"), WAIT_S):
            yield target
    except BlockingIOError as error:
        raise InputError(
            f"invalid --file={shown(str(file))}: {error.strerror} has been changing it for {WAIT_S:g} s; try again, or "
            f"end that process"
        ) from error
    except OSError as error:
        raise OutputError(
            f"invalid --file={shown(str(file))}: it cannot be written: {error.strerror or error}; must be in a folder "
            f"that you may write"
        ) from error
    finally:
        os.umask(before)


def _write(file: Path, keys: list[Key]) -> None:
    names = {f.name: f.default for f in fields(Key)}
    entries = [{name: value for name, value in asdict(key).items() if value != names[name]} for key in keys]
    with atomic_file(file) as sink:
        sink.write((json.dumps(entries, indent=1) + "\n").encode())

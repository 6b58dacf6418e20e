"""Who may use an HTTP service: a file of keys' digests, with each one's limits."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from disagg_ray.errors import ConfigError, InputError
from disagg_ray.http.schema import ApiError
from disagg_ray.media.output import write_text
from disagg_ray.request import MAX_PRIORITY
from disagg_ray.text import shown

PREFIX = "sk-"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
SESSION = "local"
"""Name of the key that `disagg-ray serve` prints."""


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
        self._read: tuple[int, list[Key]] | None = None
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
        changed = self._file.stat().st_mtime_ns if self._file.exists() else 0
        if self._read is None or self._read[0] != changed:
            self._read = changed, read_keys(self._file)
        return self._read[1] + self._session


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(file: Path) -> list[Key]:
    """Return the keys of a file; none where there is no file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = file.read_text()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"invalid service.api_keys={shown(str(file))}: it cannot be read: {error}") from error
    try:
        keys = [Key(**entry) for entry in json.loads(text)]
        if not all(map(_is_sound, keys)):
            raise ValueError("a key's name, digest or limit is none")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"invalid service.api_keys={shown(str(file))}: {error}; must be a file that `disagg-ray keys add` wrote"
        ) from error
    return keys


def _is_sound(key: Key) -> bool:
    types: dict[str, Any] = {"name": str, "sha256": str, "priority": int}
    typed = all(isinstance(getattr(key, name), kind) for name, kind in types.items())
    return typed and NAME.fullmatch(key.name) is not None and len(key.sha256) == 64 and not _wrong_limits(key)


def _wrong_limits(key: Key) -> str:
    """Return which limit is impossible, and what it must be; empty: none is."""
    if key.max_in_flight is not None and not (isinstance(key.max_in_flight, int) and key.max_in_flight >= 1):
        return f"--in-flight={key.max_in_flight}: must be at least 1"
    if key.seconds_a_day is not None and not 0 < key.seconds_a_day < math.inf:
        return f"--seconds-a-day={key.seconds_a_day}: must be a positive number"
    if abs(key.priority) > MAX_PRIORITY:
        return f"--priority={key.priority}: must be from {-MAX_PRIORITY} to {MAX_PRIORITY}"
    return ""


def add_key(file: Path, key: Key) -> str:
    """Add a key to a file, which only its owner may read; return the key, which is nowhere else.

    Raises:
        InputError: the name or a limit is impossible, or there is a key of that name.
    """
    if not NAME.fullmatch(key.name):
        raise InputError(f"invalid NAME={shown(key.name)}: must be 1 to 40 of a-z, 0-9, - and _, as alice")
    if wrong := _wrong_limits(key):
        raise InputError(f"invalid {wrong}")
    keys = read_keys(file)
    if key.name in {SESSION, *(known.name for known in keys)}:
        raise InputError(f"invalid NAME={shown(key.name)}: there is a key of this name; remove it, or give another")
    made = new_key()
    _write(file, [*keys, Key(**asdict(key) | {"sha256": digest_of(made)})])
    return made


def remove_key(file: Path, name: str) -> None:
    """Remove a key from a file.

    Raises:
        InputError: no key has that name.
    """
    keys = read_keys(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise InputError(f"invalid NAME={shown(name)}: there is no such key; there are: {known}")
    _write(file, left)


def _write(file: Path, keys: list[Key]) -> None:
    names = {f.name: f.default for f in fields(Key)}
    entries = [{name: value for name, value in asdict(key).items() if value != names[name]} for key in keys]
    before = os.umask(0o077)
    try:
        write_text(file, json.dumps(entries, indent=1) + "\n")
    finally:
        os.umask(before)

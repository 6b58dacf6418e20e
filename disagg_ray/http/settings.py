"""What an HTTP service is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from disagg_ray.config.deployment import ServiceConfig
from disagg_ray.config.rules import kinds, real, whole
from disagg_ray.config.schema import Config
from disagg_ray.config.typed import MUST
from disagg_ray.errors import ConfigError
from disagg_ray.media import storage
from disagg_ray.media.places import is_url, local_path
from disagg_ray.text import did_you_mean, shown

KEYS = ("folder", "database", "api_keys", "expires_after_s", "max_bytes", "max_upload_bytes")
"""Keys of the section `service` that are the HTTP service's."""


@dataclass(frozen=True)
class Settings:
    """Where an HTTP service keeps what, and whom it serves."""

    models: tuple[str, ...]
    """Names of the services behind it; each is a model's id."""
    service: ServiceConfig
    session_key: str | None = None
    """Digest of a key that is valid while this service runs, beside those in the file; None: no such key."""
    grace_s: float = 30.0
    """What running jobs get to finish when it ends."""

    @property
    def database(self) -> str:
        """URL of the database."""
        return self.service.database or f"sqlite:///{local_path(self.service.folder)}/jobs.db"


def make_settings(models: tuple[str, ...], config: Config, **more: Any) -> Settings:
    """Return the settings of an HTTP service, its paths absolute: Ray Serve runs it in another folder.

    Raises:
        ConfigError: names the key.
    """
    service = config.service
    if service.folder.startswith("memory:"):
        raise ConfigError(
            f"invalid service.folder={shown(service.folder)}: is lost with its process; must be a path, or a URL of "
            f"storage that stays, as s3://bucket/videos"
        )
    if is_url(service.folder) and service.database is None:
        raise ConfigError(
            f"invalid service.database=null: service.folder={shown(service.folder)} is a URL, which holds no database; "
            f"write sqlite:////path/jobs.db or postgresql://user@host/name"
        )
    if is_url(service.folder):
        if remedy := storage.missing_package(service.folder):
            raise ConfigError(
                f"invalid service.folder={shown(service.folder)}: needs a package that is not installed: {remedy}"
            )
    else:
        service = replace(service, folder=str(local_path(service.folder).absolute()))
    if service.api_keys is not None:
        service = replace(service, api_keys=str(local_path(service.api_keys).absolute()))
    return Settings(models, service, grace_s=config.failures.shutdown_grace_s, **more)


def override(config: Config, given: Mapping[str, Any]) -> Config:
    """Return a service's configuration with other settings of the HTTP service, as a Serve configuration names them.

    Raises:
        ConfigError: there is no such key, a value is impossible, or a path is relative: it would be in Serve's folder.
    """
    taken = {}
    for key, value in given.items():
        if key not in KEYS:
            raise ConfigError(f"args.{key}: unknown; there are connect, {', '.join(KEYS)}{did_you_mean(key, KEYS)}")
        taken[key] = path = _take(key, value)
        if key in ("folder", "api_keys") and path is not None and not (is_url(path) or local_path(path).is_absolute()):
            raise ConfigError(f"invalid args.{key}={shown(value)}: must be an absolute path")
    return replace(config, service=replace(config.service, **taken))


def _take(key: str, value: Any) -> Any:
    """Return a value as one of the key's type."""
    kind = kinds(ServiceConfig)[key]
    text = value if isinstance(value, str) else None
    taken = text if kind.type is str else whole(value) if kind.type is int else real(value)
    if taken is None and not (value is None and kind.optional):
        null = " or null" if kind.optional else ""
        raise ConfigError(f"invalid args.{key}={shown(value)}: {MUST[kind.type].partition(';')[0]}{null}")
    return taken


def parse_value(key: str, text: str) -> str | int | float | None:
    """Return the value of a key of KEYS from text; null leaves it out.

    Raises:
        ConfigError: it is no number, where one must be.
    """
    if text == "null":
        return None
    if key in ("folder", "database", "api_keys"):
        return text
    try:
        return float(text) if key == "expires_after_s" else int(text)
    except ValueError:
        raise ConfigError(f"invalid service.{key}={shown(text)}: must be a positive number") from None

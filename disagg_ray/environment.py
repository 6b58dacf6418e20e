"""The one place that reads or writes environment variables."""

from __future__ import annotations

import os
from pathlib import Path

from disagg_ray.errors import ConfigError


def ray_address() -> str | None:
    """Return the address of the cluster that Ray would join (`ray job submit` sets it for its entrypoints)."""
    return os.environ.get("RAY_ADDRESS") or None


def in_ray_job() -> bool:
    """Return whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def ray_auth_mode() -> str | None:
    return os.environ.get("RAY_AUTH_MODE")


def ray_token_path() -> Path:
    """Return the file that Ray reads its token from."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path) if path else home() / ".ray" / "auth_token"


def ray_temporary_folder() -> tuple[str, str]:
    """Return where Ray puts its sessions on Linux, and the name of the variable that says so."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    return name, os.environ.get(name, "/tmp")


def home() -> Path:
    """Return the user's home.

    Raises:
        ConfigError: neither HOME nor the system names one.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(
            "HOME: not set, and this user has no home; set it to a folder that can be written to"
        ) from error


def mooncake_config_path() -> Path | None:
    """Return the JSON file that Mooncake's own tools read their transport settings from."""
    path = os.environ.get("MOONCAKE_CONFIG_PATH")
    return Path(path) if path else None


def visible_gpus() -> list[str] | None:
    """Return the numbers or names of the GPUs that this process may see; None: all of the machine."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def cuda_allocator() -> str:
    """Return the settings of torch's CUDA allocator, by the name that torch looks for first."""
    return os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", ""))


def cache_folder() -> Path:
    """Return where generated checkpoints are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home() / ".cache") / "disagg_ray"


def expand_home(path: str | Path) -> Path:
    """Return a path with a leading `~` as the user's home; one that names no user stays as it is."""
    try:
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises RuntimeError for no such user
    except ValueError:  # a NUL or a lone surrogate in the user's name
        return Path(path)


def replace(name: str, value: str | None) -> None:
    """Set a variable for this process and its libraries, or remove it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def default(name: str, value: str) -> None:
    """Set a variable unless the user has."""
    os.environ.setdefault(name, value)

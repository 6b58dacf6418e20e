"""Video generation on Ray, the model cut into stages."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DisaggError,
    EncodeError,
    GraphError,
    InputError,
    OutputError,
    Overloaded,
    PoolError,
    RequestError,
    StageError,
    StartError,
    TransferError,
)
from disagg_ray.request import Request
from disagg_ray.result import Result
from disagg_ray.version import VERSION

if TYPE_CHECKING:
    from disagg_ray.driver.handle import Handle
    from disagg_ray.local import LocalPipeline
    from disagg_ray.pipeline import Pipeline
    from disagg_ray.service.client import Connection, connect

__version__ = VERSION

__all__ = [
    "Cancelled", "CheckpointError", "Config", "ConfigError", "Connection", "DisaggError", "EncodeError", "GraphError",
    "Handle", "InputError", "LocalPipeline", "OutputError", "Overloaded", "Pipeline", "PoolError", "Request",
    "RequestError", "Result", "StageError", "StartError", "TransferError", "connect", "load_config",
]  # fmt: skip


LATE = {
    "Pipeline": "disagg_ray.pipeline", "LocalPipeline": "disagg_ray.local", "Handle": "disagg_ray.driver.handle",
    "Connection": "disagg_ray.service.client", "connect": "disagg_ray.service.client",
}  # fmt: skip
"""Names that need Ray or torch: imported when they are asked for, since checking a request takes neither."""


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(import_module(LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Video generation with Wan on Ray, the model cut into stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from disagg_ray.config import Config
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
from disagg_ray.loading import load_config
from disagg_ray.request import Request
from disagg_ray.result import Result
from disagg_ray.version import VERSION

if TYPE_CHECKING:
    from disagg_ray.connection import Connection
    from disagg_ray.handle import Handle
    from disagg_ray.local import LocalPipeline
    from disagg_ray.pipeline import Pipeline

__version__ = VERSION

__all__ = [
    "Cancelled", "CheckpointError", "Config", "ConfigError", "Connection", "DisaggError", "EncodeError", "GraphError",
    "Handle", "InputError", "LocalPipeline", "OutputError", "Overloaded", "Pipeline", "PoolError", "Request",
    "RequestError", "Result", "StageError", "StartError", "TransferError", "load_config",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what needs Ray or torch only when it is asked for: checking a request takes neither."""
    if name == "Pipeline":
        from disagg_ray.pipeline import Pipeline

        return Pipeline
    if name == "Handle":
        from disagg_ray.handle import Handle

        return Handle
    if name == "Connection":
        from disagg_ray.connection import Connection

        return Connection
    if name == "LocalPipeline":
        from disagg_ray.local import LocalPipeline

        return LocalPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

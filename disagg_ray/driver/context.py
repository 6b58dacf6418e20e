"""What every request run of a driver works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from disagg_ray.config.schema import Config
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.metrics import Metrics
from disagg_ray.driver.pool import DriverPool
from disagg_ray.graph import Graph
from disagg_ray.models.geometry import Geometry
from disagg_ray.progress.events import Event


@dataclass(frozen=True)
class RunContext:
    config: Config
    graph: Graph
    geometry: Geometry
    fleet: Fleet
    driver_pool: DriverPool
    metrics: Metrics
    publish: Callable[[Event], None]
    """Takes what the driver itself reports of a request's progress."""
    driver_epoch: str
    """Tells apart the drivers that use the same replicas one after the other."""

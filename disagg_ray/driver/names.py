"""Names of a service's detached actors and placement groups, and their lookup in a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from disagg_ray.driver.calls import Actor, ReplicaId
from disagg_ray.errors import InputError, StartError
from disagg_ray.text import printable, shown

NAMESPACE = "disagg_ray"
"""Ray's namespace of all services."""
PREFIX = "disagg_ray-"
NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?")


def check_name(name: str) -> str:
    """Return a service's name if it is valid.

    Raises:
        InputError: it is not.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"invalid NAME={shown(name)}: must be 1 to 40 of a-z, 0-9, - and _, as video-480p")
    return name


def supervisor_name(name: str) -> str:
    return f"{PREFIX}{name}"


def replica_name(name: str, replica: ReplicaId, incarnation: int) -> str:
    return f"{PREFIX}{name}/{replica.name}.{incarnation}"


def group_name(name: str, index: int) -> str:
    """Return the name of the placement group whose GPU several stages share."""
    return f"{PREFIX}{name}/{index}"


def is_gang(group: str) -> bool:
    """Return whether a placement group, by its name, is of one replica's ranks; it has that actor's name."""
    return "." in group


def find_groups(name: str) -> dict[str, PlacementGroup]:
    """Return a service's placement groups by name; Ray's own lookup sees those of the caller's namespace only."""
    with _cluster_errors():
        found: dict[str, Any] = placement_group_table()
    return {
        group["name"]: PlacementGroup(ray.PlacementGroupID(bytes.fromhex(id)))
        for id, group in found.items()
        if group["name"].startswith(f"{PREFIX}{name}/") and group["state"] != "REMOVED"
    }


def release_groups(name: str) -> None:
    """Remove the placement groups of a service: of stages that share GPUs, and of ranks."""
    for group in find_groups(name).values():
        remove_placement_group(group)


def release_gangs(name: str, living: AbstractSet[str]) -> None:
    """Remove the placement groups of ranks whose actors, but for those `living`, by id, are gone."""
    for group, bundles in find_groups(name).items():
        if is_gang(group) and group.removeprefix(f"{PREFIX}{name}/") not in living:
            remove_placement_group(bundles)


def services() -> list[str]:
    """Return the names of the services, those whose supervisor is being restarted included."""
    return sorted(name.removeprefix(PREFIX) for name in _actors() if "/" not in name)


def incomplete_services() -> dict[str, list[str]]:
    """Return by name the replicas of services that are started stage by stage and lack some."""
    complete, found = set(services()), dict[str, list[str]]()
    for actor in _actors():
        name, _, replica = actor.removeprefix(PREFIX).partition("/")
        if replica and name not in complete:
            found.setdefault(name, []).append(replica.partition(".")[0])
    return {name: sorted(replicas) for name, replicas in sorted(found.items())}


def find_supervisor(name: str) -> ActorHandle[Any]:
    """Return the supervisor of a service.

    Raises:
        InputError: no service has this name; names those that run.
    """
    try:
        with _cluster_errors():
            return ray.get_actor(supervisor_name(check_name(name)), namespace=NAMESPACE)
    except ValueError:
        running = ", ".join(services()) or "none"
        raise InputError(f"NAME: no service named {name!r} in this cluster; running: {running}") from None


def find_replicas(name: str) -> list[Actor]:
    """Return the living actors of a service's replicas; their groups and settings are not known."""
    pattern = re.compile(re.escape(f"{PREFIX}{name}/") + r"(\w+)-(\d+)\.(\d+)")
    found, groups = [], find_groups(name)
    for actor in _actors():
        if match := pattern.fullmatch(actor):
            try:
                with _cluster_errors():
                    handle = ray.get_actor(actor, namespace=NAMESPACE)
            except ValueError:  # it died meanwhile
                continue
            found.append(
                Actor(ReplicaId(match[1], int(match[2]), ""), int(match[3]), handle, bundles=groups.get(actor))
            )
    return found


def _actors() -> list[str]:
    """Return the names of all services' actors."""
    with _cluster_errors():
        named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX)]


@contextmanager
def _cluster_errors() -> Iterator[None]:
    """Convert what Ray raises when the cluster has not answered for a minute."""
    try:
        yield
    except ray.exceptions.RayError as error:
        reason = printable(str(error).strip().partition("\n")[0])
        raise StartError(f"cluster: it does not answer: {reason}; run `ray status` on its head node") from error

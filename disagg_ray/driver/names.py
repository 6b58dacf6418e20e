"""What stands in a cluster: the names of detached actors, and finding them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from disagg_ray.errors import InputError, StartError
from disagg_ray.text import printable, shown

NAMESPACE = "disagg_ray"
"""Ray's namespace of all that stands."""
PREFIX = "disagg_ray-"
NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class ReplicaName:
    """A standing replica's name, taken apart."""

    stage: str
    index: int
    incarnation: int


def check_name(name: str) -> str:
    """Return the name of a service.

    Raises:
        InputError: it is none.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"invalid NAME={shown(name)}: must be 1 to 40 of a-z, 0-9, - and _, as wan-480p")
    return name


def supervisor_name(name: str) -> str:
    return f"{PREFIX}{name}"


def replica_name(name: str, post: str, incarnation: int) -> str:
    return f"{PREFIX}{name}/{post}.{incarnation}"


def group_name(name: str, index: int) -> str:
    """Return the name of the placement group whose GPU several stages share."""
    return f"{PREFIX}{name}/{index}"


def find_groups(name: str) -> dict[str, PlacementGroup]:
    """Return the placement groups of a service by name, whoever made them: Ray's own search sees those of
    its caller's namespace only."""
    with _answering():
        found: dict[str, Any] = placement_group_table()
    return {
        group["name"]: PlacementGroup(ray.PlacementGroupID(bytes.fromhex(id)))
        for id, group in found.items()
        if group["name"].startswith(f"{PREFIX}{name}/") and group["state"] != "REMOVED"
    }


def release_groups(name: str) -> None:
    """Give back the GPUs that a service's stages share."""
    for group in find_groups(name).values():
        remove_placement_group(group)


def services() -> list[str]:
    """Return the names of the services, those whose supervisor is being restarted included."""
    return sorted(name.removeprefix(PREFIX) for name in _actors() if "/" not in name)


def gathering() -> dict[str, list[str]]:
    """Return which stages are there of pipelines that were started one by one and lack some, by name."""
    stood, found = set(services()), dict[str, list[str]]()
    for actor in _actors():
        name, _, post = actor.removeprefix(PREFIX).partition("/")
        if post and name not in stood:
            found.setdefault(name, []).append(post.partition(".")[0])
    return {name: sorted(posts) for name, posts in sorted(found.items())}


def find_supervisor(name: str) -> ActorHandle[Any]:
    """Return the supervisor of a service.

    Raises:
        InputError: no such pipeline stands; names those that do.
    """
    try:
        with _answering():
            return ray.get_actor(supervisor_name(check_name(name)), namespace=NAMESPACE)
    except ValueError:
        known = ", ".join(services()) or "none"
        raise InputError(f"NAME: no pipeline {name!r} stands here; there are: {known}") from None


def find_replicas(name: str) -> dict[ReplicaName, ActorHandle[Any]]:
    """Return the replicas of a service, dead ones not among them."""
    pattern = re.compile(re.escape(f"{PREFIX}{name}/") + r"(\w+)-(\d+)\.(\d+)")
    found = {}
    for actor in _actors():
        if match := pattern.fullmatch(actor):
            try:
                with _answering():
                    handle = ray.get_actor(actor, namespace=NAMESPACE)
            except ValueError:  # it died meanwhile
                continue
            found[ReplicaName(match[1], int(match[2]), int(match[3]))] = handle
    return found


def _actors() -> list[str]:
    with _answering():
        named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX)]


@contextmanager
def _answering() -> Iterator[None]:
    """Make ours what Ray raises once the cluster has not answered for a minute."""
    try:
        yield
    except ray.exceptions.RayError as error:
        reason = printable(str(error).strip().partition("\n")[0])
        raise StartError(f"cluster: it does not answer: {reason}; look with `ray status` on its head node") from error

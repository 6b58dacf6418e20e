"""Checks access: Ray's token, its authentication mode, and listening ports."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil

from disagg_ray.doctor.check import Check, fail_unless, ok, skipped, warn, warn_unless

OWNERS = {
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "autoscaler/_private/monitor.py": "autoscaler",
    "dashboard/agent.py": "agent",
    "ray::DashboardAgent": "agent",
    "runtime_env/agent": "runtime env agent",
    "ray::RuntimeEnvAgent": "runtime env agent",
    "ray.util.client.server": "client server",
    "ray::": "worker",
}
"""Ray's processes, by words of their command line."""

PORT_RETRIES = 50
"""The dashboard takes the first free port from the given one on, within this range."""

METRICS_OWNERS = ("agent", "autoscaler", "dashboard metrics")
METRICS_S = 10.0
"""Timeout of a request for metrics: of those of a busy node."""

MOST_LISTED = 4


@dataclass(frozen=True)
class Port:
    """A listening port."""

    owner: str
    address: str
    number: int
    guarded: bool = False
    """Whether its process requires Ray's token."""

    @property
    def ip(self) -> IPv4Address | IPv6Address:
        """The address without its zone; an IPv4-mapped one as IPv4."""
        return ip_address(self.address.partition("%")[0].removeprefix("::ffff:"))

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach it."""
        return not self.ip.is_loopback


def check_token(path: Path) -> Check:
    """Check that only its owner can read Ray's token, which allows running code on the cluster."""
    if not path.exists():
        return skipped("token", f"{path} does not exist; the first cluster that disagg-ray starts creates it")
    mode = stat.S_IMODE(path.stat().st_mode)
    detail = f"{path} has mode {mode:04o}" + (": other users of this machine can use it" if mode & 0o077 else "")
    return fail_unless(not mode & 0o077, "token", detail, f"chmod 600 {path}")


def check_auth(mode: str | None) -> Check:
    """Check that the joined Ray requires a token."""
    if mode == "token":
        return ok("authentication", "Ray requires a token")
    return warn(
        "authentication", f"RAY_AUTH_MODE is {mode or 'not set'}: anyone who reaches Ray's ports can run code here",
        "ray get-auth-token --generate, copy ~/.ray/auth_token to all nodes, RAY_AUTH_MODE=token ray start ... there",
    )  # fmt: skip


def listening_ports() -> list[Port]:
    """Return the ports on which this user's Ray processes listen."""
    user = psutil.Process().username()
    processes = {
        process.pid: process.info
        for process in psutil.process_iter(["username", "cmdline", "environ", "ppid"])
        if process.info["username"] == user and _owner(process.info["cmdline"] or (), 0)
    }
    ports = []
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.pid in processes:
            info = processes[found.pid]
            started_by = processes.get(info["ppid"], info)  # a worker's title is written over its environment
            guarded = any((each["environ"] or {}).get("RAY_AUTH_MODE") == "token" for each in (info, started_by))
            port = Port("", *found.laddr)
            ports.append(replace(port, owner=_owner(info["cmdline"], port.number), guarded=guarded))
    return ports


def _owner(command: Sequence[str], port: int) -> str:
    """Return which of Ray's processes a command line is, or nothing; the dashboard also serves metrics."""
    line = " ".join(command)
    owner = next((owner for words, owner in OWNERS.items() if words in line), "")
    asked = re.search(r"--port=(\d+)", line)
    if owner == "dashboard" and asked and not 0 <= port - int(asked[1]) <= PORT_RETRIES:
        return "dashboard metrics"
    return owner


def own_ports() -> frozenset[Port]:
    """Return the ports on which this process listens."""
    found = psutil.Process().net_connections("tcp")
    return frozenset(Port("mooncake", *each.laddr) for each in found if each.status == psutil.CONN_LISTEN)


def check_ports(ports: Sequence[Port]) -> Check:
    """List Ray's ports; warn of those that other machines reach without a token."""
    if not ports:
        return skipped("ray ports", "no Ray of this user runs here")
    reachable = [port for port in ports if port.is_open and not port.guarded]
    detail = (
        f"without a token, and reachable from other machines: {_listed(reachable)}" if reachable else _listed(ports)
    )
    remedy = "RAY_AUTH_MODE=token ray start ..., on every node; else close these ports to other networks"
    return warn_unless(not reachable, "ray ports", detail, remedy)


def check_metrics_ports(ports: Iterable[Port]) -> Check:
    """Warn of ports that serve Ray's metrics: they never require the token."""
    found = [port for port in ports if port.owner in METRICS_OWNERS and port.is_open and _serves_metrics(port)]
    if not found:
        return skipped("ray metrics", "no port here serves them to other machines")
    return warn(
        "ray metrics", f"names of models, replicas and requests can be read without the token: {_listed(found)}",
        "let the firewall admit only Prometheus and the nodes to these ports",
    )  # fmt: skip


def _serves_metrics(port: Port) -> bool:
    own = {4: "127.0.0.1", 6: "::1"}[port.ip.version]
    host = own if port.ip.is_unspecified else str(port.ip)
    connection = HTTPConnection(host, port.number, timeout=METRICS_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return answer.status == HTTPStatus.OK and answer.getheader("Content-Type", "").startswith("text/plain")
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def check_dashboard(ports: Iterable[Port]) -> Check:
    """Warn of a dashboard that other machines can reach."""
    found = [port for port in ports if port.owner == "dashboard"]
    if not found:
        return skipped("dashboard", "does not run here")
    reachable = [port for port in found if port.is_open]
    detail = f"other machines can reach it: {_listed(reachable)}" if reachable else _listed(found)
    remedy = "ray start --head --dashboard-host=127.0.0.1, and ssh -L 8265:127.0.0.1:8265 HEAD"
    return warn_unless(not reachable, "dashboard", detail, remedy)


def check_mooncake_ports(ports: Iterable[Port], port_range: str | None) -> Check:
    """List Mooncake's ports, which are open on all interfaces without authentication."""
    listed = _listed(ports)
    if port_range is not None:
        return ok("mooncake ports", f"{listed}; a firewall must admit only the nodes to {port_range}")
    return warn(
        "mooncake ports", f"{listed}: any free port, without authentication",
        "set transport.port_range=15000-15999 and let the firewall admit only the nodes to it",
    )  # fmt: skip


def _listed(ports: Iterable[Port]) -> str:
    """Return ports by owner and address, as `raylet 10.0.0.1:6379,6380`; of many, their number."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for port in sorted(ports, key=lambda port: (port.owner, port.address, port.number)):
        numbers.setdefault((port.owner, port.address), []).append(port.number)
    return "; ".join(
        f"{owner} {f'[{address}]' if ':' in address else address}:"
        + (",".join(map(str, found)) if len(found) <= MOST_LISTED else f" {len(found)} ports")
        for (owner, address), found in numbers.items()
    )

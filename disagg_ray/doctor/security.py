"""Who can get in: Ray's token, its authentication mode, and the ports that listen."""

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

from disagg_ray.doctor.check import Check, fail, ok, skipped, warn

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
"""Words of a command line, and whose they are among Ray's processes."""

PORT_RETRIES = 50
"""How far from the port it is given the dashboard goes for a free one."""

METRICS_OWNERS = ("agent", "autoscaler", "dashboard metrics")
METRICS_S = 2.0
"""How long a port may take to tell metrics."""

MOST_LISTED = 4


@dataclass(frozen=True)
class Port:
    """A port that listens."""

    owner: str
    address: str
    number: int
    guarded: bool = False
    """Whether its process asks for Ray's token."""

    @property
    def ip(self) -> IPv4Address | IPv6Address:
        """The address without a zone, and as IPv4 where it is that in IPv6's clothes."""
        return ip_address(self.address.partition("%")[0].removeprefix("::ffff:"))

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach it."""
        return not self.ip.is_loopback


def check_token(path: Path) -> Check:
    """See that nobody but its owner can read Ray's token: whoever holds it runs code on the cluster."""
    if not path.exists():
        return skipped("token", f"{path} is not there; the first cluster that disagg-ray starts makes it")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return fail("token", f"{path} has mode {mode:04o}: others on this machine can use it", f"chmod 600 {path}")
    return ok("token", f"{path} has mode {mode:04o}")


def check_auth(mode: str | None) -> Check:
    """See whether the Ray that was joined asks for a token."""
    if mode == "token":
        return ok("authentication", "Ray asks for a token")
    return warn(
        "authentication", f"RAY_AUTH_MODE is {mode or 'not set'}: whoever reaches Ray's ports runs code here",
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
    """Return which of Ray's processes a command line is, or nothing; the dashboard's has ports for other things too."""
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
    """Say where Ray listens, and whether everybody who reaches it gets in."""
    if not ports:
        return skipped("ray ports", "no Ray of this user runs here")
    reachable = [port for port in ports if port.is_open and not port.guarded]
    if not reachable:
        return ok("ray ports", _listed(ports))
    return warn(
        "ray ports", f"without a token, and reachable from other machines: {_listed(reachable)}",
        "RAY_AUTH_MODE=token ray start ..., on every node; else close these ports to other networks",
    )  # fmt: skip


def check_metrics_ports(ports: Iterable[Port]) -> Check:
    """Say which ports tell Ray's metrics: they answer without the token that the process asks for elsewhere."""
    found = [port for port in ports if port.owner in METRICS_OWNERS and port.is_open and _tells_metrics(port)]
    if not found:
        return skipped("ray metrics", "no port tells them here")
    return warn(
        "ray metrics", f"whoever connects reads names of models, replicas and requests, token or not: {_listed(found)}",
        "let the firewall admit only Prometheus and the nodes to these ports",
    )  # fmt: skip


def _tells_metrics(port: Port) -> bool:
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
    """See that the dashboard is reached from its own machine only."""
    found = [port for port in ports if port.owner == "dashboard"]
    reachable = [port for port in found if port.is_open]
    if reachable:
        return warn(
            "dashboard", f"other machines can reach it: {_listed(reachable)}",
            "ray start --head --dashboard-host=127.0.0.1, and ssh -L 8265:127.0.0.1:8265 HEAD",
        )  # fmt: skip
    return ok("dashboard", _listed(found)) if found else skipped("dashboard", "does not run here")


def check_mooncake_ports(ports: Iterable[Port], port_range: str | None) -> Check:
    """Say where Mooncake listens: on all interfaces, and it asks nobody who they are."""
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

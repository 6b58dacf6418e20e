"""Keys of the transfer between pools."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from disagg_ray.config.rules import MOST_S, Check, Rule, Section, at_least, at_most, one_of
from disagg_ray.text import MASK


def _is_port_range(text: str) -> bool:
    first, dash, last = text.partition("-")
    digits = bool(dash) and all(part.isascii() and part.isdigit() and len(part) <= 5 for part in (first, last))
    return digits and 1024 <= int(first) <= int(last) <= 65535


def _is_pool_size(size: int | str) -> bool:
    return size == "auto" or (isinstance(size, int) and size > 0)


PoolBytes = Annotated[int | str, Rule(_is_pool_size, "must be auto or a number of bytes")]
SERVER = f"must be P2PHANDSHAKE or an address, with its password for {MASK}"


@dataclass(frozen=True)
class TransportConfig(Section):
    """Tensor transfer between pools, by Mooncake."""

    protocol: Annotated[str, one_of("auto", "nvlink_intra", "rdma", "tcp")] = "auto"
    """auto (for each pair of pools the fastest that both support), nvlink_intra, rdma or tcp."""
    device_name: str = ""
    """RDMA devices, comma separated; empty: Mooncake's choice. For protocols rdma and auto."""
    metadata_server: Annotated[str, Rule(lambda server: server and MASK not in server, SERVER)] = "P2PHANDSHAKE"
    """Mooncake's metadata server: P2PHANDSHAKE needs none; else an etcd, redis or http address."""
    port_range: Annotated[str, Rule(_is_port_range, "must be FIRST-LAST, as 15000-15999,")] | None = None
    """Ports for Mooncake and progress, as `FIRST-LAST`, for a firewall: three for each route of each pool, and one for
    the progress of each driver; null: any free port."""
    admit: Annotated[str, one_of("auto", "host", "any")] = "auto"
    """Who may connect to those ports: host (this machine only), any, or auto (host on a local cluster, else any)."""
    pool_bytes: PoolBytes = "auto"
    """Registered memory of each replica, in bytes. auto: twice the replica's fair share of in-flight requests, at the
    largest size that limits allow. Less than requests need not to wait for each other is refused."""
    driver_pool_bytes: PoolBytes = "auto"
    """Registered host memory of the driver's pool, in bytes: input images and finished latents."""
    verify: bool = True
    """Check a checksum of every pulled tensor."""
    timeout_s: Annotated[float, at_least(5), at_most(MOST_S)] = 30.0
    """Timeout of a pull, in seconds; Mooncake takes no less than 5."""

    def rules(self) -> Iterator[Check]:
        remedy = f"must be left out: it is for rdma or auto, and transport.protocol is {self.protocol}"
        yield "device_name", self.device_name, not self.device_name or self.protocol in ("auto", "rdma"), remedy

    @property
    def ports(self) -> range | None:
        """The ports of `port_range`."""
        if self.port_range is None:
            return None
        first, _, last = self.port_range.partition("-")
        return range(int(first), int(last) + 1)

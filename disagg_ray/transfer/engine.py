"""The only place that imports mooncake, at the first engine."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

from disagg_ray import environment
from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import ConfigError, TransferError
from disagg_ray.process import quiet_stderr
from disagg_ray.text import mask
from disagg_ray.transfer.guard import Guard
from disagg_ray.transfer.handoff import Session
from disagg_ray.transfer.recent import Recent
from disagg_ray.transfer.sockets import admit, filter_of, listeners, listening_ports

logger = logging.getLogger("disagg_ray")

TIMED_OUT = -1000
"""Code of a peer that gave no sign of life; Mooncake's own codes are small."""

SILENT = "no answer within transport.timeout_s"
GONE = "the peer is gone or refused the read"
MAX_MET = 10_000
"""Sessions that are remembered as met: those that were read from last."""


class Engine:
    """One Mooncake transfer engine: a session, one registered region, reads from other sessions.

    Mooncake listens on all interfaces whatever `host` says; the host is only what is announced to peers.
    """

    def __init__(self, host: str, transport: TransportConfig, taken: frozenset[str] = frozenset()) -> None:
        """Open an engine; its session's name is none of those that are `taken`."""
        self._timeout_s = transport.timeout_s
        _export(transport)
        known = listening_ports()
        self._engine = _new_engine()
        with quiet_stderr():
            code = self._engine.initialize(host, transport.metadata_server, transport.protocol, transport.device_name)
        if code != 0:
            raise TransferError(
                f"Mooncake could not start with transport.protocol={transport.protocol} "
                f"device_name={transport.device_name!r} metadata_server={mask(transport.metadata_server)}"
                + (f", or transport.port_range={transport.port_range} has no free port" if transport.ports else ""),
                host, 0, code,
            )  # fmt: skip
        port = self._engine.get_rpc_port()
        self._guard = _guard(host, port, transport, known)
        if self._guard is not None:
            port = self._guard.port
        self.session = Session(transport.protocol, _name(host, port, taken))
        self._met: Recent[str] = Recent(MAX_MET)

    @property
    def met(self) -> frozenset[str]:
        """Names of the sessions that Mooncake has read from here: it never forgets where their memory lay."""
        return frozenset(self._met)

    def register(self, address: int, nbytes: int) -> None:
        """Make a region readable by any peer that reaches this host's ports."""
        code = self._engine.register_memory(address, nbytes)
        if code != 0:
            raise TransferError("Mooncake could not register the pool", self.session.name, nbytes, code)

    def unregister(self, address: int) -> None:
        self._engine.unregister_memory(address)

    def close(self) -> None:
        """Let no peer meet this engine any more; those that have met it may still read what is registered."""
        if self._guard is not None:
            self._guard.close()

    def read(self, peer: Session, local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy regions of a peer's memory into ours, one-sided: the peer's process takes no part.

        One region after another: a batch that fails returns while Mooncake still writes its other regions.

        Raises:
            ReadTimeout: no answer by the deadline.
            TransferError: the peer is gone, or refused; nothing is written any more.
        """
        self._meet(peer, sum(lengths))
        for region in zip(local, remote, lengths, strict=True):
            code = self._read_region(peer, region)
            if code != 0:  # a pooled connection breaks now and then: a new one serves, or the peer is really gone
                code = self._read_region(peer, region)
            if code != 0:
                raise TransferError(GONE, peer.name, sum(lengths), code)
        self._met.add(peer.name)

    def _read_region(self, peer: Session, region: tuple[int, int, int]) -> int:
        started = time.monotonic()
        code = int(self._engine.transfer_sync_read(peer.name, *region))
        if code != 0 and time.monotonic() - started >= self._timeout_s:
            raise ReadTimeout(SILENT, peer.name, region[2], code)
        return code

    def _meet(self, peer: Session, nbytes: int) -> None:
        """Wait for a sign of life before the first read of a peer.

        That read opens a session, and Mooncake lets no other read pass until the peer has answered: up to a minute.
        """
        if peer.name in self._met:
            return
        answer: Future[int] = Future()
        threading.Thread(
            target=lambda: answer.set_result(self._engine.send_probe(peer.name)), name="mooncake-probe", daemon=True
        ).start()
        try:
            code = answer.result(self._timeout_s)
        except FutureTimeout:
            raise TransferError(SILENT, peer.name, nbytes, TIMED_OUT) from None
        if code != 0:
            raise TransferError(GONE, peer.name, nbytes, code)


def _guard(host: str, port: int, transport: TransportConfig, known: frozenset[int]) -> Guard | None:
    """Hide Mooncake's handshake port behind a guard, and admit to its others only those who may come.

    RDMA's own handshake goes to Mooncake's port by name, as does one through a metadata server: neither has a guard.
    """
    program = filter_of(transport.admit)
    opened = listeners(known)
    is_guarded = transport.protocol != "rdma" and transport.metadata_server == "P2PHANDSHAKE"
    try:
        if program is not None:
            for number, listener in opened.items():
                if number != port or not is_guarded:
                    admit(listener, program)
        if is_guarded:
            if port not in opened or opened[port].family != socket.AF_INET:
                raise OSError(f"no IPv4 socket of this process listens on {port}")
            return Guard(host, transport.ports, opened.pop(port), program)
    except OSError as error:
        logger.warning("Mooncake's ports stay open to anybody, and certain bytes there end the process: %s", error)
    finally:
        for listener in opened.values():
            listener.close()
    return None


def _name(host: str, port: int, taken: frozenset[str]) -> str:
    """Return a session's name that none of the taken ones equals.

    An engine that has met a process under a name looks for another one's memory where that one's was. Zeros before the
    port make a new name of the same place.
    """
    digits = str(port)
    while f"{host}:{digits}" in taken:
        digits = "0" + digits
    return f"{host}:{digits}"


class ReadTimeout(TransferError):
    """A read ran past its deadline.

    Mooncake gives no sign of when the peer's late bytes can no longer arrive: the destination may still be written to
    for as long as the peer's process lives.
    """


def _new_engine() -> Any:
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise ConfigError(
            f"transport: mooncake cannot be loaded ({error}); install the extra cpu, cuda12 or cuda13 that fits this "
            f"machine, and the system libraries (apt-get install libcurl4 libibverbs1 libnuma1)"
        ) from error
    return TransferEngine()


def _export(settings: TransportConfig) -> None:
    """Hand the settings that Mooncake only takes from the environment, before it starts.

    It reads the ports once a process: later engines there lie in the first one's range.
    """
    environment.replace("MC_INTRANODE_NVLINK", "1" if settings.protocol == "nvlink_intra" else None)
    environment.replace("MC_TRANSFER_TIMEOUT", str(math.ceil(settings.timeout_s)))
    environment.default("MC_LOG_LEVEL", "ERROR")
    if (ports := settings.ports) is not None:
        for name in ("RPC", "PRC"):  # Mooncake releases differ in the spelling
            environment.replace(f"MC_MIN_{name}_PORT", str(ports[0]))
            environment.replace(f"MC_MAX_{name}_PORT", str(ports[-1]))


def with_mooncake_file(transport: TransportConfig) -> TransportConfig:
    """Let a MOONCAKE_CONFIG_PATH file speak where our configuration says nothing else than the default."""
    path = environment.mooncake_config_path()
    if path is None:
        return transport
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"MOONCAKE_CONFIG_PATH: {str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"MOONCAKE_CONFIG_PATH: {str(path)!r} must hold a JSON object")
    plain = TransportConfig()

    def setting(name: str) -> str:
        ours = str(getattr(transport, name))
        return str(given.get(name, ours)) if ours == getattr(plain, name) else ours

    return replace(
        transport,
        protocol=setting("protocol"),
        device_name=setting("device_name"),
        metadata_server=setting("metadata_server"),
    )

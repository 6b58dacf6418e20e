"""The only place that imports mooncake, at the first engine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

from disagg_ray import environment
from disagg_ray.config import TransportConfig
from disagg_ray.errors import ConfigError, TransferError
from disagg_ray.handoff import Session

TIMED_OUT = -1000
"""Code of a read that had not returned by its deadline; Mooncake's own codes are small."""

GRACE_S = 2.0
"""How long after Mooncake's own timeout a read may still take to return."""


class Engine:
    """One Mooncake transfer engine: a session, one registered region, reads from other sessions.

    Mooncake listens on all interfaces whatever `host` says; the host is only what peers are told.
    """

    def __init__(self, host: str, transport: TransportConfig) -> None:
        settings = _with_mooncake_file(transport)
        self._timeout_s = settings.timeout_s
        _export(settings)
        self._engine = _new_engine()
        code = self._engine.initialize(host, settings.metadata_server, settings.protocol, settings.device_name)
        if code != 0:
            raise TransferError(
                f"Mooncake could not start with transport.protocol={settings.protocol} "
                f"device_name={settings.device_name!r} metadata_server={settings.metadata_server}",
                host, 0, code,
            )  # fmt: skip
        self.session = Session(settings.protocol, f"{host}:{self._engine.get_rpc_port()}")
        self._reader = ThreadPoolExecutor(max_workers=4, thread_name_prefix="mooncake-read")

    def register(self, address: int, nbytes: int) -> None:
        """Make a region readable by any peer that reaches this host's ports."""
        code = self._engine.register_memory(address, nbytes)
        if code != 0:
            raise TransferError("Mooncake could not register the pool", self.session.name, nbytes, code)

    def unregister(self, address: int) -> None:
        self._engine.unregister_memory(address)

    def read(self, peer: Session, local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy regions of a peer's memory into ours, one-sided: the peer's process takes no part.

        Raises:
            ReadTimeout: no answer by the deadline; `settled` ends when Mooncake can no longer write to `local`.
            TransferError: the peer is gone, or refused.
        """
        started = time.monotonic()
        read = self._reader.submit(
            self._engine.batch_transfer_sync_read, peer.name, list(local), list(remote), list(lengths)
        )
        try:
            code = read.result(self._timeout_s + GRACE_S)
        except FutureTimeout:
            raise ReadTimeout(peer.name, sum(lengths), TIMED_OUT, read) from None
        if code != 0 and time.monotonic() - started >= self._timeout_s:
            raise ReadTimeout(peer.name, sum(lengths), code, None)
        if code != 0:
            raise TransferError("the peer is gone or refused the read", peer.name, sum(lengths), code)

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)


class ReadTimeout(TransferError):
    """A read ran past its deadline; its destination may still be written to.

    `settled` is the read itself while it has not returned. None: it has returned, but Mooncake gives no sign of when
    the peer's late bytes can no longer arrive.
    """

    def __init__(self, session: str, nbytes: int, code: int, settled: Future[int] | None = None) -> None:
        super().__init__("no answer within transport.timeout_s", session, nbytes, code)
        self.settled = settled

    def __reduce__(self) -> Any:  # a future does not travel between processes
        return TransferError, self.args


def _new_engine() -> Any:
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise ConfigError(
            f"transport: mooncake cannot be loaded ({error}); install the extra cpu, cuda12 or cuda13 that fits this "
            f"machine, and the system library libibverbs1 (apt-get install libibverbs1)"
        ) from error
    return TransferEngine()


def _export(settings: TransportConfig) -> None:
    """Hand the settings that Mooncake only takes from the environment, before it starts."""
    environment.replace("MC_TRANSFER_TIMEOUT", str(int(settings.timeout_s)))
    environment.default("GLOG_minloglevel", "3")  # its codes come back as our errors
    if settings.port_range is not None:
        first, _, last = settings.port_range.partition("-")
        for name in ("RPC", "PRC"):  # Mooncake releases differ in the spelling
            environment.replace(f"MC_MIN_{name}_PORT", first)
            environment.replace(f"MC_MAX_{name}_PORT", last)


def _with_mooncake_file(transport: TransportConfig) -> TransportConfig:
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

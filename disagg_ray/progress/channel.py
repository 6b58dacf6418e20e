"""Events from replicas to their driver, over ZeroMQ.

Each replica pushes events to one socket that the driver binds. Events may be lost and never delay a stage: what cannot
be sent at once is dropped and counted. CURVE encrypts with keys made for the run. It alone would admit any client, so a
ZAP handler admits only the run's client key.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from disagg_ray.progress.events import MAX_BYTES, Event, pack, unpack
from disagg_ray.transfer.sockets import EVERYBODY, NOBODY, Program, admit, listen

logger = logging.getLogger("disagg_ray")

CURVE_BYTES = 33
"""What encryption adds to a message: its command's name, flags, a nonce and an authenticator."""

QUEUED_EVENTS = 1000
"""At each end of a connection; more are dropped."""

STEP_INTERVAL_S = 0.1
"""Least time between two steps of an attempt that are sent; the first and the last always are."""

HANDSHAKE_MS = 5_000
"""Time that a connection has to authenticate."""

CONNECT_MS, RECONNECT_MS = 5_000, 10_000

HEARTBEAT_MS, SILENT_MS = 15_000, 60_000
"""Heartbeats keep a quiet connection open through firewalls; one without an answer is closed and made anew."""

DOMAIN = "progress"
"""Of the ZAP handler."""

CLOSE_S = 5.0
"""How long closing waits for a thread."""


@dataclass(frozen=True)
class Credentials:
    """Where a run's events go, and the keys (Z85) that let a replica in. Ray carries them to the replicas."""

    endpoint: str
    """tcp://host:port"""
    server_key: str
    public_key: str
    secret_key: str = field(repr=False)


class Receiver:
    """The driver's end: bind a port of `host` and pass each event to `on_event`, on a thread of its own.

    `on_event` must return at once and not raise. The port is a free one of `ports`, or any; the packet filter `program`
    decides who may connect. If no port is free, or `host` is not an address of this machine, `credentials` is None and
    no events come: progress is never worth failing for.
    """

    def __init__(
        self,
        host: str,
        on_event: Callable[[Event], None],
        ports: range | None = None,
        program: Program | None = None,
    ) -> None:
        self.credentials: Credentials | None = None
        self.received = 0
        self._malformed = 0
        self._connections = Counter[int]()
        self._on_event = on_event
        self._program = program or EVERYBODY
        self._gate: socket.socket | None = None
        self._is_shut = False
        self._max_open = _most_connections()
        self._closing, self._close = socket.socketpair()
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()  # before the port opens: without a handler zmq admits anyone
        self._socket = self._context.socket(zmq.PULL)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._bind(host, ports)
        self._thread = threading.Thread(target=self._run, name="disagg_ray-progress", daemon=True)
        self._thread.start()

    @property
    def rejected(self) -> int:
        """Messages that were no events, and connections that were not let in (or not yet: that takes milliseconds)."""
        accepted, admitted = (self._connections[kind] for kind in (zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED))
        return self._malformed + accepted - admitted

    def _bind(self, host: str, ports: range | None) -> None:
        server_key, server_secret = zmq.curve_keypair()
        public_key, secret_key = zmq.curve_keypair()
        admits = SimpleNamespace(callback=lambda _domain, key: key == public_key)
        self._authenticator.configure_curve_callback(DOMAIN, admits)
        options: dict[int, int | bytes] = {
            zmq.LINGER: 0, zmq.IPV6: ":" in host, zmq.RCVHWM: QUEUED_EVENTS, zmq.MAXMSGSIZE: MAX_BYTES + CURVE_BYTES,
            zmq.HANDSHAKE_IVL: HANDSHAKE_MS, zmq.HEARTBEAT_IVL: HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: SILENT_MS,
            zmq.ZAP_DOMAIN: DOMAIN.encode(), zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: server_secret,
        }  # fmt: skip
        for option, value in options.items():
            self._socket.set(option, value)
        address = f"[{host}]" if ":" in host else host
        try:
            self._gate = listen(host, ports, None if self._program is EVERYBODY else self._program)
            self._gate.setblocking(False)
            self._socket.set(zmq.USE_FD, os.dup(self._gate.fileno()))
            self._socket.bind(f"tcp://{address}:*")
        except (OSError, zmq.ZMQError) as error:
            within = f" within transport.port_range={ports[0]}-{ports[-1]}" if ports else ""
            logger.warning("no progress will be shown: cannot listen on %s%s (%s)", host, within, error)
            return
        endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self.credentials = Credentials(endpoint, server_key.decode(), public_key.decode(), secret_key.decode())

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._closing, self._monitor, self._socket):
            poller.register(source, zmq.POLLIN)
        while self._closing.fileno() not in (ready := dict(poller.poll())):
            if self._monitor in ready:
                self._connections[parse_monitor_message(self._monitor.recv_multipart())["event"]] += 1
                self._bound_connections()
            if self._socket in ready:
                with suppress(zmq.Again):  # zmq may announce a message where a stranger sent what is none
                    self._receive(self._socket.recv(zmq.NOBLOCK))
        self._closing.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        if self._gate is not None:
            self._gate.close()
        self._authenticator.stop()
        self._context.term()

    def _bound_connections(self) -> None:
        """Refuse new connections while there are too many, or strangers would use up the process's descriptors."""
        num_open = self._connections[zmq.EVENT_ACCEPTED] - self._connections[zmq.EVENT_DISCONNECTED]
        shut = num_open >= self._max_open
        if shut == self._is_shut or self._gate is None:
            return
        if shut:
            logger.warning("%d connections to the progress port: more are refused until some end", num_open)
        self._is_shut = shut
        admit(self._gate, NOBODY if shut else self._program)

    def _receive(self, data: bytes) -> None:
        try:
            event = unpack(data)
        except ValueError:
            self._malformed += 1
            return
        self.received += 1
        self._on_event(event)

    def close(self) -> None:
        """Close the port and end the thread; `on_event` is not called any more. Idempotent."""
        self._close.close()
        self._thread.join(CLOSE_S)


def _most_connections() -> int:
    """Return how many connections may be open at once: a quarter of the process's descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (limit if limit != resource.RLIM_INFINITY else 4096) // 4


class Sender:
    """A replica's end. Any of its threads may send, and none ever waits. Without credentials nothing is sent."""

    def __init__(self, credentials: Credentials | None) -> None:
        self.sent = 0
        self.dropped = 0
        """Events that could not be sent; steps that followed too closely not among them."""
        self._lock = threading.Lock()
        """Guards the socket, which is not thread-safe, and the counts."""
        self._last = ("", -math.inf)
        """Whose step was sent last, and when; a replica computes one request at a time."""
        self._socket = _connect(credentials) if credentials is not None else None

    def wait_connected(self, timeout_s: float) -> bool:
        """Return whether events can be sent, at the latest after `timeout_s`."""
        with self._lock:
            return self._socket is not None and bool(self._socket.poll(round(timeout_s * 1000), zmq.POLLOUT))

    def send(self, event: Event) -> None:
        """Send an event if that can be done at once; drop it otherwise."""
        data = pack(event)
        with self._lock:
            if self._socket is None or self._follows_closely(event):
                return
            try:
                if len(data) > MAX_BYTES:  # the receiver would cut the connection
                    raise zmq.Again
                self._socket.send(data, zmq.NOBLOCK)
                self.sent += 1
            except zmq.Again:
                self.dropped += 1

    def _follows_closely(self, event: Event) -> bool:
        """Return whether an event is one step of many in a short time."""
        if event.state != "running" or event.step in (0, event.steps):
            return False
        request_id, sent = self._last
        if event.request_id == request_id and 0 <= event.time - sent < STEP_INTERVAL_S:
            return True
        self._last = event.request_id, event.time
        return False

    def close(self) -> None:
        """Close the connection; what is sent from now on goes nowhere. Idempotent."""
        with self._lock:
            push, self._socket = self._socket, None
        if push is not None:
            push.close()


def _connect(credentials: Credentials) -> zmq.Socket[bytes]:
    push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    options: dict[int, int | bytes] = {
        zmq.LINGER: 0, zmq.IPV6: "[" in credentials.endpoint, zmq.SNDHWM: QUEUED_EVENTS, zmq.IMMEDIATE: 1,
        zmq.CONNECT_TIMEOUT: CONNECT_MS, zmq.RECONNECT_IVL_MAX: RECONNECT_MS,
        zmq.HEARTBEAT_IVL: HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: SILENT_MS,
        zmq.CURVE_SERVERKEY: credentials.server_key.encode(),
        zmq.CURVE_PUBLICKEY: credentials.public_key.encode(),
        zmq.CURVE_SECRETKEY: credentials.secret_key.encode(),
    }  # fmt: skip
    for option, value in options.items():
        push.set(option, value)
    push.connect(credentials.endpoint)
    return push

"""What replicas tell the driver while they work: the only place that imports zmq and msgpack.

Each replica pushes events to one socket that the driver binds. Events may be lost and never make a stage wait: what
cannot leave at once is dropped and counted. CURVE encrypts with keys made for the run, and since CURVE alone admits any
client, a ZAP allow-list admits the run's one client key.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import resource
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from disagg_ray.progress.events import MAX_BYTES, Event, _leaves, pack, unpack
from disagg_ray.transfer.sockets import EVERYBODY, NOBODY, Program, admit, listen

logger = logging.getLogger("disagg_ray")

CURVE_BYTES = 33
"""What encryption adds to a message: its command's name, flags, a nonce and an authenticator."""

QUEUED_EVENTS = 1000
"""How many may be on their way at each end before more are dropped."""

STEP_INTERVAL_S = 0.1
"""Least time between two steps of an attempt that are sent; the first and the last always are."""

HANDSHAKE_MS = 5_000
"""How long a stranger may keep a connection on which it says nothing."""

CONNECT_MS, RECONNECT_MS = 5_000, 10_000

HEARTBEAT_MS, SILENT_MS = 15_000, 60_000
"""Heartbeats keep a quiet connection open through firewalls; one without an answer is closed and made anew."""

CLOSE_S = 5.0
"""How long closing waits for a callback to return."""


@dataclass(frozen=True)
class Credentials:
    """Where a run's events go, and the keys (Z85) that let a replica in. Ray carries them to the replicas."""

    endpoint: str
    """tcp://host:port"""
    server_key: str
    public_key: str
    secret_key: str = field(repr=False)


class _Watcher:
    """Passes events to a callback; what that raises is logged once and stops nothing."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._failed = False

    def tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:
            if not self._failed:
                logger.exception("what watches the progress failed; the videos go on")
            self._failed = True


class Receiver:
    """The driver's end: binds a port of `host` and hands each event to `on_event`, on a thread of its own.

    The port is a free one of `ports`, or any; a filter `program` says who may come. If there is none, or `host` is not
    an address of this machine, `credentials` is None and no events come: progress is never worth failing for.
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
        self._watcher = _Watcher(on_event)
        self._domain = uuid.uuid4().hex
        self._closing, self._close = socket.socketpair()
        context = _shared.acquire()
        self._socket = context.socket(zmq.PULL)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._program = program or EVERYBODY
        self._gate: socket.socket | None = None
        self._is_shut = False
        self._max_open = _most_connections()
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
        _shared.admit(self._domain, public_key)  # before the port opens: without a handler zmq admits anyone
        options: dict[int, int | bytes] = {
            zmq.LINGER: 0, zmq.IPV6: ":" in host, zmq.RCVHWM: QUEUED_EVENTS, zmq.MAXMSGSIZE: MAX_BYTES + CURVE_BYTES,
            zmq.HANDSHAKE_IVL: HANDSHAKE_MS, zmq.HEARTBEAT_IVL: HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: SILENT_MS,
            zmq.ZAP_DOMAIN: self._domain.encode(), zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: server_secret,
        }  # fmt: skip
        for option, value in options.items():
            self._socket.set(option, value)
        try:
            self._listen(host, ports)
        except (OSError, zmq.ZMQError) as error:
            within = f" within transport.port_range={ports[0]}-{ports[-1]}" if ports else ""
            logger.warning("no progress will be shown: cannot listen on %s%s (%s)", host, within, error)
            return
        endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self.credentials = Credentials(endpoint, server_key.decode(), public_key.decode(), secret_key.decode())

    def _listen(self, host: str, ports: range | None) -> None:
        gate = self._gate = listen(host, ports, None if self._program is EVERYBODY else self._program)
        gate.setblocking(False)
        self._socket.set(zmq.USE_FD, os.dup(gate.fileno()))
        self._socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._closing, self._monitor, self._socket):
            poller.register(source, zmq.POLLIN)
        while self._closing.fileno() not in (ready := dict(poller.poll())):
            if self._monitor in ready:
                self._connections[parse_monitor_message(self._monitor.recv_multipart())["event"]] += 1
                self._watch_gate()
            if self._socket in ready:
                with suppress(zmq.Again):  # zmq may announce a message where a stranger sent what is none
                    self._receive(self._socket.recv(zmq.NOBLOCK))

    def _watch_gate(self) -> None:
        """Let nobody in while there are too many connections, or strangers would use up the process's descriptors."""
        num_open = self._connections[zmq.EVENT_ACCEPTED] - self._connections[zmq.EVENT_DISCONNECTED]
        shut = num_open >= self._max_open
        if shut == self._is_shut or self._gate is None:
            return
        if shut:
            logger.warning("%d connections to the progress port: no more are taken until some end", num_open)
        self._is_shut = shut
        admit(self._gate, NOBODY if shut else self._program)

    def _receive(self, data: bytes) -> None:
        try:
            event = unpack(data)
        except ValueError:
            self._malformed += 1
            return
        self.received += 1
        self._watcher.tell(event)

    def close(self) -> None:
        """Close the port and end the thread; `on_event` is not called any more. Idempotent."""
        if self._close.fileno() < 0:
            return
        self._close.close()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("what watches the progress has hung for %.0f s: left behind", CLOSE_S)
        else:
            self._end()

    def _end(self) -> None:
        self._closing.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        if self._gate is not None:
            self._gate.close()
        _shared.expel(self._domain)
        _shared.release()


def _most_connections() -> int:
    """Return how many connections may be open at once: a quarter of the process's descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (limit if limit != resource.RLIM_INFINITY else 4096) // 4


class Listener:
    """Hands events to `on_event` on a thread of its own, so that it holds nobody up; too many are dropped."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._watcher = _Watcher(on_event)
        self._events: queue.Queue[Event | None] = queue.Queue(QUEUED_EVENTS)
        self._thread = threading.Thread(target=self._run, name="disagg_ray-listener", daemon=True)
        self._thread.start()

    def hear(self, event: Event) -> None:
        with suppress(queue.Full):
            self._events.put_nowait(event)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            self._watcher.tell(event)

    def close(self) -> None:
        """Deliver what came before and end the thread; one that hangs is left behind."""
        with suppress(queue.Full):
            self._events.put(None, timeout=CLOSE_S)
            if self._thread is not threading.current_thread():  # a callback may close the pipeline
                self._thread.join(CLOSE_S)


class Sender:
    """A replica's end. Any of its threads may send, and none ever waits. Without credentials nothing is sent."""

    def __init__(self, credentials: Credentials | None) -> None:
        self.sent = 0
        self.dropped = 0
        """Events that had nowhere to go, steps that followed too closely not among them."""
        self._lock = threading.Lock()  # of the socket, which is not thread-safe, and of what is below
        self._last: dict[str, float] = {}
        """By request: when a step of it was last sent."""
        self._socket: zmq.Socket[bytes] | None = None
        if credentials is not None:
            self._socket = _shared.acquire().socket(zmq.PUSH)
            self._connect(self._socket, credentials)

    def _connect(self, push: zmq.Socket[bytes], credentials: Credentials) -> None:
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

    def send(self, event: Event) -> None:
        """Send an event if that can be done at once; drop it otherwise."""
        with self._lock:
            if self._socket is None or self._follows_closely(event):
                return
            if _leaves(self._socket, pack(event)):
                self.sent += 1
            else:
                self.dropped += 1

    def _follows_closely(self, event: Event) -> bool:
        """Return whether an event is one step of many in a short time."""
        if event.state != "running" or event.step in (0, event.steps):
            self._last.pop(event.request_id, None)
            return False
        if 0 <= event.time - self._last.get(event.request_id, -math.inf) < STEP_INTERVAL_S:
            return True
        self._last[event.request_id] = event.time
        return False

    def close(self) -> None:
        """Close the connection; what is sent from now on goes nowhere. Idempotent."""
        with self._lock:
            push, self._socket = self._socket, None
        if push is not None:
            push.close()
            _shared.release()


class _OneKey:
    """An allow-list of one client, in the form that pyzmq's authenticator asks for."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._key


class _Shared:
    """The process's one zmq context, from its first user to its last, and the one ZAP handler a context can have."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._context: zmq.Context[zmq.Socket[bytes]]
        self._authenticator: ThreadAuthenticator | None = None

    def acquire(self) -> zmq.Context[zmq.Socket[bytes]]:
        with self._lock:
            if self._users == 0:
                self._context = zmq.Context()
            self._users += 1
            return self._context

    def admit(self, domain: str, key: bytes) -> None:
        """Admit a client key to the sockets of a ZAP domain, and no other."""
        with self._lock:
            if self._authenticator is None:
                self._authenticator = ThreadAuthenticator(self._context)
                self._authenticator.start()
            self._authenticator.configure_curve_callback(domain, _OneKey(key))

    def expel(self, domain: str) -> None:
        with self._lock:
            assert self._authenticator is not None
            del self._authenticator.credentials_providers[domain]

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if self._authenticator is not None:
                    self._authenticator.stop()
                    self._authenticator = None
                self._context.term()


_shared = _Shared()

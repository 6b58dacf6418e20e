"""A guard in front of Mooncake's handshake port.

Mooncake listens on all interfaces, takes one connection after another, waits five seconds for each that is silent, and
ends the process when JSON is not what it expects. Here only a guard in the same process reaches its port. That
listens on the node's address, takes one message of a known kind within a deadline, and asks Mooncake in its own words:
no byte of a stranger's arrives there.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress

from disagg_ray.transfer.sockets import BACKLOG, NOBODY, Program, admit, listen, local_port

logger = logging.getLogger("disagg_ray")

METADATA, PROBE = 1, 3
"""Kinds of messages that are passed on: where the memory is, and whether the engine answers. Mooncake's number for each
is the first byte after the length (8 bytes, little-endian) that counts it too."""
EMPTY = b"{}"
"""What Mooncake does not look at in either."""
MAX_BYTES = 1 << 20
"""Of a message, as Mooncake has it."""
MAX_OPEN = 64
"""Connections at once; the oldest gives way to the next."""
TOLD = frozenset(10**power for power in range(10))
"""How many refusals are worth a line in the log."""
DEADLINE_S = 5.0
"""Of a whole conversation."""


class Guard:
    """Listens for Mooncake, on a thread of its own.

    `refused` counts conversations that came to nothing.
    """

    def __init__(self, host: str, ports: range | None, hidden: socket.socket, program: Program | None) -> None:
        """Hide a listening socket of Mooncake's, and listen in its place for those whom the filter `program` passes.

        Raises:
            OSError: no port is free, or the kernel takes no filters; nothing is hidden.
        """
        self._hidden = hidden
        self._listener = listen(host, ports, program)
        admit(hidden, NOBODY)
        self._turn = asyncio.Lock()
        self._open: dict[asyncio.StreamWriter, None] = {}
        self.refused = 0
        self.port: int = self._listener.getsockname()[1]
        self._closed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="disagg_ray-guard", daemon=True).start()

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listener, backlog=BACKLOG))
        self._loop.run_until_complete(self._closed.wait())
        server.close()
        for writer in self._open:
            writer.transport.abort()
        self._loop.run_until_complete(_finish(asyncio.all_tasks(self._loop)))
        self._loop.close()
        self._hidden.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = None
        if len(self._open) > MAX_OPEN:
            next(iter(self._open)).transport.abort()
        try:
            async with asyncio.timeout(DEADLINE_S):
                writer.write(await self._ask(await _kind(reader)))
                await writer.drain()
        except (OSError, EOFError, TimeoutError, ValueError):
            self._count_refused()
        finally:
            del self._open[writer]
            writer.close()

    def _count_refused(self) -> None:
        self.refused += 1
        if self.refused in TOLD:
            logger.warning("handshake port %d: %d conversations were refused or given up", self.port, self.refused)

    async def _ask(self, kind: int) -> bytes:
        """Ask Mooncake; return its answer as sent."""
        message = (1 + len(EMPTY)).to_bytes(8, "little") + bytes([kind]) + EMPTY
        async with self._turn:
            with socket.socket() as own:
                own.bind(("127.0.0.1", 0))
                own.setblocking(False)
                admit(self._hidden, local_port(own.getsockname()[1]))
                await self._loop.sock_connect(own, ("127.0.0.1", self._hidden.getsockname()[1]))
                await self._loop.sock_sendall(own, message)
                answer = b""
                while chunk := await self._loop.sock_recv(own, 1 << 16):
                    answer += chunk
        if not answer:
            raise EOFError("Mooncake gave no answer")
        return answer

    def close(self) -> None:
        """Stop listening. Idempotent."""
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._closed.set)


async def _kind(reader: asyncio.StreamReader) -> int:
    """Take a whole message; return its kind.

    Raises:
        ValueError: it is none of those that peers send.
        EOFError: it is not whole.
    """
    length = int.from_bytes(await reader.readexactly(8), "little")
    if not 1 <= length <= MAX_BYTES:
        raise ValueError("no message is that long")
    (kind,) = await reader.readexactly(1)
    if kind not in (METADATA, PROBE):
        raise ValueError("peers send no such message")
    left = length - 1
    while left:
        chunk = await reader.read(min(left, 1 << 16))
        if not chunk:
            raise EOFError("the message is not whole")
        left -= len(chunk)
    return int(kind)


async def _finish(tasks: Iterable[asyncio.Task[None]]) -> None:
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

"""Listening sockets that admit few: the kernel drops what a packet filter refuses, which needs no privilege to set."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import stat
import struct
from contextlib import suppress

FAMILIES = (socket.AF_INET, socket.AF_INET6)
SO_ATTACH_FILTER = 26
"""Linux's number; Python has no name for it."""
BACKLOG = 32
"""Connections that wait to be accepted; more are dropped by the kernel, and an honest peer tries again."""
SPEAK_S = 20
"""How long the kernel keeps a connection back on which nothing was said."""

_WORD, _HALF, _AND, _TO_X, _EQUAL, _EQUAL_X, _RETURN = 0x20, 0x28, 0x54, 0x07, 0x15, 0x1D, 0x06
"""Instructions of classic BPF: loads of 4 and 2 bytes, and with a constant, A to X, jumps, return."""
_PROTOCOL, _IP = 0xFFFFF000, 0xFFF00000
"""Offsets of what the kernel knows of the packet, and of the network header; plain ones count from TCP's header."""
_IPV4, _LOOPBACK = 0x0800, 0x7F000001

Program = list[tuple[int, int, int, int]]
"""Instruction, how many to skip if its condition holds and if not, and its constant."""
_PASS, _DROP = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)

NOBODY: Program = [_DROP]
EVERYBODY: Program = [_PASS]
THIS_MACHINE: Program = [
    (_HALF, 0, 0, _PROTOCOL),
    (_EQUAL, 0, 6, _IPV4),
    (_WORD, 0, 0, _IP + 12),
    (_TO_X, 0, 0, 0),
    (_AND, 0, 0, 0xFF000000),
    (_EQUAL, 18, 0, 0x7F000000),
    (_WORD, 0, 0, _IP + 16),
    (_EQUAL_X, 16, 17, 0),
    *(
        step
        for word in (0, 4, 8, 12)  # of an IPv6 address
        for step in (
            (_WORD, 0, 0, _IP + 8 + word),
            (_TO_X, 0, 0, 0),
            (_WORD, 0, 0, _IP + 24 + word),
            (_EQUAL_X, 0, 13 - word, 0),
        )
    ),
    _PASS,
    _DROP,
]
"""From 127.0.0.0/8, or from the very address that is spoken to: no other host has it; the kernel drops forged ones."""


def filter_of(admit: str) -> Program | None:
    """Return the filter for a value of `transport.admit`, or None: everybody."""
    return THIS_MACHINE if admit == "host" else None


def local_port(port: int) -> Program:
    """Return a filter that lets only a port of 127.0.0.1 in."""
    source = [(_WORD, 0, 0, _IP + 12), (_EQUAL, 0, 3, _LOOPBACK)]
    return [*source, (_HALF, 0, 0, 0), (_EQUAL, 0, 1, port), _PASS, _DROP]


def admit(listener: socket.socket, program: Program) -> None:
    """Have a listening socket, and what it accepts from now on, receive only what a filter passes."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(code)))


def listen(host: str, ports: range | None, program: Program | None = None) -> socket.socket:
    """Return a socket that listens on a free port of `ports`, or on any, for those whom a filter passes.

    Connections on which nothing is said are not accepted for a while.

    Raises:
        OSError: none is free, or `host` is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wanted = random.sample(ports, len(ports)) if ports else [0]
    for number, port in enumerate(wanted, 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed is free at once
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SPEAK_S)
            if program is not None:
                admit(listener, program)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            if number == len(wanted):
                raise
        else:
            return listener
    raise AssertionError("the last port was taken or raised")


def listeners(besides: frozenset[int] = frozenset()) -> dict[int, socket.socket]:
    """Return this process's listening sockets by their ports; each is a duplicate, for the caller to close."""
    found: dict[int, socket.socket] = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            other = socket.socket(fileno=os.dup(int(name)))
            if other.family in FAMILIES and other.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                port = other.getsockname()[1]
                if port not in besides and port not in found:
                    found[port] = other
                    continue
            other.close()
    return found


def listening_ports() -> frozenset[int]:
    """Return the ports that this process listens on."""
    found = listeners()
    for other in found.values():
        other.close()
    return frozenset(found)

"""Listening sockets and whom they admit."""

import socket
from contextlib import closing

import pytest

from disagg_ray.transfer.sockets import (
    NOBODY,
    THIS_MACHINE,
    admit,
    filter_of,
    listen,
    listeners,
    listening_ports,
    local_port,
)


def connect(listener: socket.socket, own_port: int = 0) -> None:
    """Connect, say something and hear an answer."""
    source = ("127.0.0.1", own_port) if own_port else None
    with socket.create_connection(listener.getsockname()[:2], 2, source) as client:
        client.sendall(b"hello")
        server, _ = listener.accept()
        with server:
            assert server.recv(5) == b"hello"
            server.sendall(b"you too")
            assert client.recv(7) == b"you too"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_this_machine_reaches_what_is_for_it_alone(host: str) -> None:
    with closing(listen(host, None, filter_of("host"))) as listener:
        connect(listener)
        admit(listener, NOBODY)
        with pytest.raises(TimeoutError):
            connect(listener)
        admit(listener, THIS_MACHINE)
        connect(listener)


def test_only_one_local_port_gets_in() -> None:
    with closing(listen("127.0.0.1", None)) as listener, socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        admit(listener, local_port(own.getsockname()[1]))
        with pytest.raises(TimeoutError):
            connect(listener)
        own.connect(listener.getsockname())


def test_the_free_port_of_a_range_is_found_and_none_is_an_error() -> None:
    with closing(listen("127.0.0.1", None)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            listen("127.0.0.1", range(port, port + 1))
        with closing(listen("127.0.0.1", range(port, port + 50))) as other:
            assert port < other.getsockname()[1] < port + 50


def test_own_listening_sockets_are_found() -> None:
    before = listening_ports()
    with closing(listen("127.0.0.1", None)) as listener:
        found = listeners(before)
        assert set(found) == {listener.getsockname()[1]}
        for duplicate in found.values():
            duplicate.close()
    assert listening_ports() == before

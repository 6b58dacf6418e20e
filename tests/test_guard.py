"""Strangers at the ports of a pool: their bytes end nothing, their silence holds nobody up."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
import torch
from peer import HOST, TRANSPORT, Peer, make_tensors, publish

from disagg_ray.transfer import guard
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool


def framed(body: bytes, length: int | None = None) -> bytes:
    return (len(body) if length is None else length).to_bytes(8, "little") + body


DEEP = b"[" * 5000 + b"]" * 5000
HOSTILE = {
    "a list": framed(b"[1,2]"),
    "a list as each kind": b"".join(framed(bytes([kind]) + b"[1,2]") for kind in range(5)),
    "wrong types as metadata": framed(b"\1" + b'{"name": [1], "buffers": 3}'),
    "deep": framed(b"\1" + DEEP),
    "a notice": framed(b"\2" + b'{"name": 1}'),
    "too long": framed(b"\1{}", 1 << 40),
    "cut off": framed(b"\1{}", 100),
    "nothing": framed(b""),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def port_of(peer: Peer) -> int:
    return int(peer.session.rpartition(":")[2])


def send(port: int, data: bytes) -> None:
    """Send bytes and wait until the other end has done with them."""
    with socket.create_connection((HOST, port), 10) as stranger, suppress(ConnectionError):
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(4096):
            pass


def pull(handoff: Handoff) -> torch.Tensor:
    """Pull into a new pool, which has yet to meet the peer."""
    pool, key = Pool("puller", 1 << 20, HOST, TRANSPORT), AttemptKey("pulling", 0)
    pool.reserve(key, {meta.name: meta.spec.nbytes for meta in handoff.tensors})
    latents = pool.pull(key, handoff)["latents"].clone()
    pool.close()
    return latents


def is_well(peer: Peer) -> bool:
    return torch.equal(pull(peer.ask(publish)), make_tensors()["latents"])


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_no_bytes_at_the_handshake_port_end_the_process(peer: Peer, data: bytes) -> None:
    send(port_of(peer), data)
    assert is_well(peer)


def test_many_silent_connections_hold_nobody_up(peer: Peer) -> None:
    with ExitStack() as stack:
        for data in [b""] * 40 + [b"\1"] * 2 * guard.MAX_OPEN:
            silent = stack.enter_context(socket.create_connection((HOST, port_of(peer)), 10))
            silent.sendall(data)
        assert is_well(peer)


def test_mooncakes_own_handshake_port_hears_nobody() -> None:
    with Peer() as peer:
        ports = [c.laddr.port for c in psutil.Process(peer.pid).net_connections("tcp") if c.status == "LISTEN"]
        open_ports = []
        for port in ports:
            with suppress(TimeoutError), socket.create_connection((HOST, port), 1):
                open_ports.append(port)
        assert len(ports) == 3
        assert port_of(peer) in open_ports
        assert len(open_ports) == 2, "the guard's, and the data's"


def test_ports_for_this_machine_alone_hear_no_other_address() -> None:
    addresses = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    others = [address for address in addresses if not address.startswith("127.")]
    if not others:
        pytest.skip("this machine has no address but loopback's")
    with Peer(admit="host") as peer:
        for connection in psutil.Process(peer.pid).net_connections("tcp"):
            if connection.status == "LISTEN":
                with pytest.raises(TimeoutError):
                    socket.create_connection((HOST, connection.laddr.port), 1, (others[0], 0))
        assert is_well(peer)

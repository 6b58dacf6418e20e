"""Events over real sockets on loopback, from replicas and from strangers."""

import gc
import logging
import multiprocessing
import os
import queue
import resource
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import astuple, replace
from multiprocessing.connection import Connection
from typing import Any, get_args

import msgpack
import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from disagg_ray import Pipeline, Request
from disagg_ray.progress import listener as listening
from disagg_ray.progress.channel import Credentials, Receiver, Sender
from disagg_ray.progress.events import MAX_BYTES, Event, State, pack, unpack
from disagg_ray.progress.listener import QUEUED_EVENTS, Listener

HOST = "127.0.0.1"
DEADLINE_S = 300
FEW = 128
"""File descriptors, of a process with hardly enough."""
TIMES = 20
"""Repetitions that would leave at least as many descriptors or threads, if one left any."""
EVENT = Event("a1b2", "transformer", "transformer-0", 0, "running", 3, 50, 1.5)

spawn = multiprocessing.get_context("spawn")


class Inbox(Receiver):
    """A receiver that keeps its events for the test."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        super().__init__(HOST, self.events.put)

    def get(self) -> Event:
        return self.events.get(timeout=DEADLINE_S)

    @property
    def given(self) -> Credentials:
        assert self.credentials is not None
        return self.credentials

    @property
    def address(self) -> tuple[str, int]:
        return HOST, int(self.given.endpoint.rpartition(":")[2])


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with closing(Inbox()) as receiver:
        yield receiver


def connected(credentials: Credentials) -> Sender:
    """Return a sender whose connection stands; before that it drops everything."""
    sender = Sender(credentials)
    assert sender.wait_connected(DEADLINE_S)
    return sender


@pytest.fixture
def hostile(inbox: Inbox, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[zmq.Socket[bytes]]:
    """Give a connection that has the run's key and sends what it likes."""
    with context.socket(zmq.PUSH) as push:
        push.linger = 0
        push.curve_serverkey = inbox.given.server_key.encode()
        push.curve_publickey, push.curve_secretkey = inbox.given.public_key.encode(), inbox.given.secret_key.encode()
        push.connect(inbox.given.endpoint)
        assert push.poll(DEADLINE_S * 1000, zmq.POLLOUT)
        yield push


@pytest.fixture
def sender(inbox: Inbox) -> Iterator[Sender]:
    with closing(connected(inbox.given)) as sender:
        yield sender


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_event_arrives_as_it_was_sent(inbox: Inbox, sender: Sender) -> None:
    sender.send(EVENT)
    assert inbox.get() == EVENT
    assert (inbox.received, inbox.rejected, sender.sent, sender.dropped) == (1, 0, 1, 0)


@pytest.mark.parametrize("state", get_args(State))
def test_every_state_survives_the_wire(state: State) -> None:
    event = replace(EVENT, request_id="猫 [bold]", attempt=2, state=state, num_ranks=4)
    assert unpack(pack(event)) == event


def test_several_threads_may_send_at_once(inbox: Inbox, sender: Sender) -> None:
    events = [replace(EVENT, request_id=f"r{index}", state="done") for index in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(sender.send, events))
    assert {inbox.get() for _ in events} == set(events)


def test_a_burst_loses_only_what_is_counted(inbox: Inbox, sender: Sender) -> None:
    for index in range(10_000):
        sender.send(replace(EVENT, state="done", attempt=index))
    attempts = [inbox.get().attempt for _ in range(sender.sent)]
    assert attempts == sorted(set(attempts))
    assert sender.sent + sender.dropped == 10_000
    assert inbox.rejected == 0


def test_steps_in_quick_succession_are_thinned_out(inbox: Inbox, sender: Sender) -> None:
    for step in range(51):
        sender.send(replace(EVENT, step=step, time=100 + step * 0.02))
    sender.send(replace(EVENT, state="publishing"))
    steps = [event.step for event in iter(inbox.get, replace(EVENT, state="publishing"))]
    assert (steps[0], steps[1], steps[-1]) == (0, 1, 50)
    assert len(steps) == pytest.approx(1 / 0.1 + 3, abs=3)
    assert sender.dropped == 0


def test_one_request_does_not_thin_out_another(inbox: Inbox, sender: Sender) -> None:
    for request_id in ("first", "second"):
        sender.send(replace(EVENT, request_id=request_id))
    assert [inbox.get().request_id for _ in range(2)] == ["first", "second"]


def test_a_request_that_ends_between_two_of_its_steps_is_forgotten(sender: Sender) -> None:
    class Id(str): ...

    name = Id("cancelled")
    known = weakref.ref(name)
    for request_id in (name, "next"):
        sender.send(replace(EVENT, request_id=request_id))
    del name, request_id
    assert known() is None


def test_a_clock_that_is_set_back_does_not_silence_a_request(inbox: Inbox, sender: Sender) -> None:
    for step, seconds in ((1, 5000.0), (2, 1000.0)):
        sender.send(replace(EVENT, step=step, time=seconds))
    assert [inbox.get().step for _ in range(2)] == [1, 2]


WRONG: dict[str, tuple[Any, ...]] = {
    "too few": astuple(EVENT)[:-1],
    "too many": (*astuple(EVENT), 0),
    "not text": (7, *astuple(EVENT)[1:]),
    "bytes": (b"a1b2", *astuple(EVENT)[1:]),
    "true for a number": (*astuple(EVENT)[:3], True, *astuple(EVENT)[4:]),
    "whole time": (*astuple(EVENT)[:-2], 1, 1),
    "no ranks": astuple(replace(EVENT, num_ranks=0)),
    "empty id": astuple(replace(EVENT, request_id="")),
    "long id": astuple(replace(EVENT, request_id="x" * 201)),
    "control characters": astuple(replace(EVENT, request_id="\x1b[2J")),
    "unknown state": astuple(replace(EVENT, state="sleeping")),  # type: ignore[arg-type]
    "steps below zero": astuple(replace(EVENT, step=-1)),
    "more steps than there are": astuple(replace(EVENT, step=51)),
    "countless steps": astuple(replace(EVENT, steps=1 << 40)),
    "no time": astuple(replace(EVENT, time=float("nan"))),
    "endless time": astuple(replace(EVENT, time=float("inf"))),
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_event_is_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        unpack(msgpack.packb(fields))


DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.binary(max_size=MAX_BYTES) | DATA.map(msgpack.packb))
def test_any_bytes_are_refused_with_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x91" * MAX_BYTES, b"\xd6\xff\x00\x00\x00\x00", b"\xdf\xff\xff\xff\xff"]
)
def test_garbage_from_a_replica_is_counted_and_the_rest_arrives(
    inbox: Inbox, hostile: zmq.Socket[bytes], data: bytes
) -> None:
    hostile.send(data)
    hostile.send(pack(EVENT))
    assert inbox.get() == EVENT
    assert inbox.rejected == 1


def test_a_huge_message_is_cut_off_and_others_get_through(
    inbox: Inbox, sender: Sender, hostile: zmq.Socket[bytes]
) -> None:
    hostile.send(b"x" * (64 << 20))
    sender.send(EVENT)
    assert inbox.get() == EVENT
    assert inbox.received == 1


def test_an_event_that_is_too_large_is_dropped_by_its_sender(inbox: Inbox, sender: Sender) -> None:
    sender.send(replace(EVENT, request_id="x" * MAX_BYTES))
    sender.send(EVENT)
    assert inbox.get() == EVENT
    assert sender.dropped == 1


def test_the_largest_id_a_request_may_have_fits(inbox: Inbox, sender: Sender) -> None:
    event = replace(EVENT, request_id="\N{CAT FACE}" * 200)
    sender.send(event)
    assert inbox.get() == event


def strangers(given: Credentials) -> dict[str, dict[int, bytes]]:
    public, secret = zmq.curve_keypair()
    keys = {zmq.CURVE_PUBLICKEY: public, zmq.CURVE_SECRETKEY: secret}
    return {
        "no security": {},
        "a password": {zmq.PLAIN_USERNAME: b"admin", zmq.PLAIN_PASSWORD: b"admin"},
        "a key of its own": {**keys, zmq.CURVE_SERVERKEY: given.server_key.encode()},
        "a wrong server key": {**keys, zmq.CURVE_SERVERKEY: public},
    }


@pytest.mark.parametrize("kind", ["no security", "a password", "a key of its own", "a wrong server key"])
def test_a_stranger_is_refused_and_counted(
    inbox: Inbox, sender: Sender, context: zmq.Context[zmq.Socket[bytes]], kind: str
) -> None:
    with context.socket(zmq.PUSH) as stranger:
        stranger.linger = 0
        for option, value in strangers(inbox.given)[kind].items():
            stranger.set(option, value)
        stranger.connect(inbox.given.endpoint)
        with suppress(zmq.Again):  # once it is refused there is nowhere to send to
            stranger.send(pack(replace(EVENT, request_id="stranger")), zmq.NOBLOCK)
        until(lambda: inbox.rejected > 0)
        sender.send(EVENT)
        assert inbox.get() == EVENT
    assert inbox.received == 1


def test_the_key_of_another_run_does_not_open_this_one(inbox: Inbox, sender: Sender) -> None:
    with closing(Inbox()) as other:
        mixed = replace(inbox.given, endpoint=other.given.endpoint, server_key=other.given.server_key)
        with closing(Sender(mixed)) as stranger, closing(connected(other.given)) as own:
            until(lambda: other.rejected > 0)
            stranger.send(EVENT)
            own.send(replace(EVENT, request_id="own"))
            assert other.get().request_id == "own"
    sender.send(EVENT)
    assert inbox.get() == EVENT


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53)])
def test_a_port_scanner_is_counted_and_does_no_harm(inbox: Inbox, sender: Sender, said: bytes) -> None:
    with socket.create_connection(inbox.address) as scanner:
        scanner.sendall(said)
        until(lambda: inbox.rejected == 1)
        sender.send(EVENT)
        assert inbox.get() == EVENT


def test_a_receiver_that_is_gone_costs_its_senders_nothing_but_events(inbox: Inbox, sender: Sender) -> None:
    inbox.close()
    until(lambda: not sender.wait_connected(0))
    for _ in range(100):
        sender.send(replace(EVENT, state="done"))
    assert (sender.sent, sender.dropped) == (0, 100)


def test_a_port_that_never_answers_swallows_events(inbox: Inbox) -> None:
    with socket.create_server((HOST, 0)) as mute:
        given = replace(inbox.given, endpoint=f"tcp://{HOST}:{mute.getsockname()[1]}")
        with closing(Sender(given)) as sender:
            mute.accept()
            sender.send(EVENT)
            assert (sender.sent, sender.dropped) == (0, 1)


def _receive(connection: Connection) -> None:
    events: list[Event] = []
    with closing(Receiver(HOST, events.append)) as receiver:
        connection.send(receiver.credentials)
        expected = connection.recv()
        until(lambda: len(events) == expected)
        connection.send(set(events))


@pytest.mark.slow
def test_a_receiver_that_hangs_makes_nobody_wait_and_may_come_back() -> None:
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_receive, args=(theirs,), daemon=True)
    process.start()
    with closing(connected(ours.recv())) as sender:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        while not sender.dropped:
            sender.send(replace(EVENT, state="done"))
        os.kill(process.pid, signal.SIGCONT)
        ours.send(sender.sent)
        assert ours.recv() == {replace(EVENT, state="done")}
    process.join(DEADLINE_S)
    assert process.exitcode == 0


def _receive_with_few_descriptors(connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    _receive(connection)


@pytest.mark.proof
def test_strangers_who_stay_do_not_use_up_the_descriptors() -> None:
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_receive_with_few_descriptors, args=(theirs,), daemon=True)
    process.start()
    credentials = ours.recv()
    host, _, port = credentials.endpoint.removeprefix("tcp://").rpartition(":")
    with ExitStack() as stack:
        for _ in range(2 * FEW):
            stranger = stack.enter_context(socket.socket())
            stranger.setblocking(False)
            stranger.connect_ex((host, int(port)))
            if select.select([], [stranger], [], 0.05)[1]:
                with suppress(OSError):
                    stranger.send(b"\xff")
            until(lambda: psutil.Process(process.pid).num_fds() < 3 * FEW // 4)  # its thread may have its turn late
    with closing(connected(credentials)) as sender:
        sender.send(EVENT)
        ours.send(1)
        assert ours.recv() == {EVENT}
    process.join(DEADLINE_S)


def _send(credentials: Credentials, name: str) -> None:
    sender = connected(credentials)
    while True:
        sender.send(replace(EVENT, request_id=name, state="done"))
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_that_dies_or_hangs_does_not_disturb_the_others(inbox: Inbox, sender: Sender, how: int) -> None:
    process = spawn.Process(target=_send, args=(inbox.given, "victim"), daemon=True)
    process.start()
    assert process.pid is not None
    assert inbox.get().request_id == "victim"
    os.kill(process.pid, how)
    sender.send(EVENT)
    assert EVENT in iter(inbox.get, None)
    process.kill()
    process.join()


def test_a_callback_that_fails_is_reported_once_and_events_go_on(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []

    def watch(event: Event) -> None:
        heard.append(event)
        raise RuntimeError("a bug in the callback")

    with closing(Listener(watch)) as listener:
        for attempt in range(3):
            listener.notify(replace(EVENT, attempt=attempt))
    assert [event.attempt for event in heard] == [0, 1, 2]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_callback_that_hangs_delays_neither_events_nor_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "CLOSE_S", 0.05)
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def watch(_event: Event) -> None:
        entered.set()
        leave.wait()
        left.set()

    threads = threading.enumerate()  # pipelines of other tests have listeners too
    listener = Listener(watch)
    listener.notify(EVENT)
    assert entered.wait(DEADLINE_S)
    for _ in range(2 * QUEUED_EVENTS):
        listener.notify(EVENT)
    listener.close()
    assert not left.is_set()
    leave.set()
    until(lambda: set(threading.enumerate()) <= set(threads))


def test_closing_leaves_no_thread_no_socket_and_no_zap_handler() -> None:
    process = psutil.Process()
    gc.collect()  # descriptors of earlier tests
    zmq.Context.instance().socket(zmq.PUSH).close()  # senders share the process's context, which stays
    before, threads = (process.num_fds(), process.num_threads()), threading.enumerate()
    for _ in range(TIMES):
        receiver = Inbox()
        sender = connected(receiver.given)
        sender.send(EVENT)
        receiver.get()
        for end in (sender, receiver, sender, receiver):
            end.close()
        sender.send(EVENT)
    assert sender.sent == 1
    until(lambda: set(threading.enumerate()) <= set(threads))
    # zmq closes what earlier tests left a little later: there may be fewer than before
    # and what else runs in this process may have opened some
    until(lambda: process.num_fds() < before[0] + TIMES and process.num_threads() < before[1] + TIMES)


def test_an_address_of_another_machine_means_no_progress_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with closing(Receiver("192.0.2.77", print)) as receiver, closing(Sender(receiver.credentials)) as sender:
        sender.send(EVENT)
        assert receiver.credentials is None
    assert "192.0.2.77" in caplog.text
    assert (sender.sent, sender.dropped) == (0, 0)


def test_the_port_is_a_free_one_of_those_that_are_given(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server((HOST, 0)) as taken, closing(Receiver(HOST, print)) as other:
        assert other.credentials is not None
        ports = {taken.getsockname()[1], int(other.credentials.endpoint.rpartition(":")[2])}
        for port in ports:
            with closing(Receiver(HOST, print, range(port, port + 1))) as receiver:
                assert receiver.credentials is None
            assert f"within transport.port_range={port}-{port}" in caplog.text
            with closing(Receiver(HOST, print, range(port, port + 100))) as receiver:
                assert receiver.credentials is not None
                assert port < int(receiver.credentials.endpoint.rpartition(":")[2]) < port + 100


def test_the_secret_key_is_not_shown(inbox: Inbox) -> None:
    assert inbox.given.endpoint in repr(inbox.given)
    assert inbox.given.secret_key not in repr(inbox.given)


@pytest.mark.slow
def test_without_progress_replicas_tell_of_no_step(cluster: None) -> None:
    heard: list[Event] = []
    given = ("fused=true", "progress=false", "defaults.num_inference_steps=2")
    with Pipeline.from_config("conf/tiny_t2v.yaml", *given, on_event=heard.append) as pipeline:
        pipeline.generate(Request("a cat", seed=1))
    assert [event.state for event in heard][-1:] == ["done"]
    assert not any(event.steps for event in heard)

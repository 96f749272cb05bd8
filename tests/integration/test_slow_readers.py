"""Clients that do not take what they are owed: write_timeout, max_buffer_memory."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

import pytest

import kecho
from kecho.server.confinement.sandbox import IS_SANITIZED
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    many_descriptors,
    plenty,
    receive_exactly,
    receive_until_reset,
    send_until_blocked,
    transfer,
    wait_for,
)
from support.fixture_types import StartServer
from support.server_process import ServerProcess

pytestmark = pytest.mark.engines(dispatch=True)

SMALL = {"receive_buffer": 4096, "send_buffer": 65536}


def stuffed(server: kecho.Server | str | int) -> socket.socket:
    """A client that has sent until nothing more went, and reads nothing.

    On a busy machine a server with a short timeout may reset it before.
    """
    client = connect(server, **SMALL)
    try:
        with contextlib.suppress(ConnectionResetError):
            send_until_blocked(client, plenty(), quiet_s=0.3)
    except BaseException:
        client.close()
        raise
    return client


def read_a_little(client: socket.socket, seconds: float, every_s: float) -> None:
    """Sends all that is taken, and reads 8 KiB now and then; fails if the connection ends."""
    view, sent = memoryview(plenty()), 0
    client.setblocking(False)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.send(view[sent : sent + (1 << 20)])
                assert sent < len(view)
        with contextlib.suppress(BlockingIOError):
            assert client.recv(8192)
        time.sleep(every_s)
    client.settimeout(DEADLINE_S)


def stuff_until_evicted(
    server: kecho.Server, stack: contextlib.ExitStack, count: int
) -> list[socket.socket]:
    """Stuffed clients, in this order, of whom as many have been reset for want of room.

    A client that is itself reset while it sends, because the others are being served at that
    moment, is left out.
    """
    clients: list[socket.socket] = []
    for _ in range(100):
        if server.stats().closed["evicted"] >= count:
            return clients
        with contextlib.suppress(ConnectionError):
            clients.append(stack.enter_context(stuffed(server)))
    pytest.fail(f"after 100 clients: {server.stats()}")


# ---- write_timeout ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_client_that_takes_nothing_is_closed(
    start_server: StartServer, dispatch: str, kind: str, tmp_path: object
) -> None:
    where = {"uds": f"{tmp_path}/socket"} if kind == "unix" else {}
    server = start_server(dispatch=dispatch, write_timeout=2.0, **where)
    with stuffed(server) as client, connect(server) as idle:
        begun = time.monotonic()
        wait_for(lambda: server.stats().closed["stalled"] == 1, "it is closed")
        assert time.monotonic() - begun < 10
        if kind == "tcp":
            receive_until_reset(client)
        assert echo(idle, b"an idle client is not meant") == b"an idle client is not meant"
    stats = server.stop()
    assert (stats.closed["stalled"], stats.errors.total) == (1, 0)


@pytest.mark.parametrize(
    "sandbox", ["--sandbox", pytest.param("--no-sandbox", marks=pytest.mark.release)]
)
def test_a_client_that_reads_a_little_now_and_then_is_not_closed(
    start_process: Callable[..., ServerProcess], dispatch: str, sandbox: str
) -> None:
    """So little that epoll never reports room to send: only acknowledgements tell of it."""
    if sandbox == "--sandbox" and IS_SANITIZED:
        pytest.skip("a build with a sanitizer has no sandbox")
    process = start_process(
        "--dispatch", dispatch, "--write-timeout=2", "--stats-interval=0.5", sandbox
    )
    with connect(process.port, **SMALL) as client:
        read_a_little(client, 4, every_s=0.2)
        # Its own kernel may pass over the reset: its window is shut, and the reset beyond it.
        process.wait_until_said("closed stalled=1")
    assert process.stop() == 0


def test_a_client_that_takes_nothing_of_what_the_kernel_holds_is_closed(
    start_server: StartServer, dispatch: str
) -> None:
    """The server has handed over every byte and waits for nothing: the client's window is shut."""
    server = start_server(dispatch=dispatch, write_timeout=1.0)
    with connect(server, **SMALL) as client, connect(server) as idle:
        assert echo(idle, b"x") == b"x"
        for _ in range(30):
            client.sendall(bytes(1000))
        wait_for(lambda: server.stats().bytes_sent == 30_001, "the kernel has all of it")
        begun = time.monotonic()
        wait_for(lambda: server.stats().closed["stalled"] == 1, "it is closed")
        assert time.monotonic() - begun < 2.0 + 1  # a loaded machine is late, too
        assert server.stats().backpressure == 0
        receive_until_reset(client)
        assert echo(idle, b"an idle client is not meant") == b"an idle client is not meant"
    stats = server.stop()
    assert (stats.closed["stalled"], stats.closed["timed_out"], stats.errors.total) == (1, 0, 0)


def test_without_a_write_timeout_the_kernel_keeps_a_client_that_takes_nothing(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch)
    with connect(server, **SMALL) as client:
        for _ in range(30):
            client.sendall(bytes(1000))
        time.sleep(2.5)
        assert receive_exactly(client, 30_000) == bytes(30_000)


def test_what_the_clients_kernel_has_taken_does_not_count_as_unread(
    start_server: StartServer, dispatch: str
) -> None:
    """Nobody but the client's host could tell."""
    server = start_server(dispatch=dispatch, write_timeout=0.5)
    with connect(server) as client:
        client.sendall(b"hello")
        time.sleep(2)
        assert receive_exactly(client, 5) == b"hello"
        assert echo(client, b"again") == b"again"


def test_an_inherited_socket_has_no_user_timeout_of_the_server_before(
    start_server: StartServer, dispatch: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        given.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 700)
        start_server(fd=given.fileno(), dispatch=dispatch, write_timeout=1.5)
        assert given.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_a_client_that_opens_its_window_by_less_than_a_segment_is_not_closed(
    start_server: StartServer, dispatch: str
) -> None:
    """The kernel takes it for one whose window is shut all the time: TCP_USER_TIMEOUT ends it."""
    server = start_server(dispatch=dispatch, write_timeout=2.0)
    with connect(server, **SMALL) as client:
        client.sendall(bytes(100_000))
        for _ in range(12):
            time.sleep(0.3)  # the kernel probes a window that has been shut for 200 ms
            assert client.recv(4096)
        assert server.stats().closed.total == 0


@pytest.mark.slow_under_sanitizers  # the timeout is five seconds
def test_a_client_that_comes_back_in_time_gets_every_byte(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, write_timeout=5.0)
    data = plenty()[: 32 << 20]
    received = bytearray()
    with connect(server, **SMALL) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(1.0)
        while chunk := client.recv(1 << 20):
            received += chunk
        sender.join(DEADLINE_S)
    assert received == data
    assert server.stop().closed["eof"] == 1


def test_both_timeouts_hold_for_what_they_are_about(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, write_timeout=2.0, idle_timeout=5.0)
    with stuffed(server), connect(server) as idle:
        assert echo(idle, b"x") == b"x"
        wait_for(lambda: server.stats().closed["stalled"] == 1, "the one that does not read")
        assert server.stats().closed["idle"] == 0
        wait_for(lambda: server.stats().closed["idle"] == 1, "the idle one")
        assert idle.recv(1) == b""


def test_a_client_that_reads_slowly_is_not_idle(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=2.0)
    with connect(server, **SMALL) as client:
        read_a_little(client, 4, every_s=0.1)
        assert server.stats().closed.total == 0


# ---- max_buffer_memory --------------------------------------------------------------------------


def test_beyond_the_limit_the_slowest_readers_are_reset(
    start_server: StartServer, dispatch: str
) -> None:
    # One worker: under percpu each has a share of its own. A buffer holds what the kernel left of a
    # chunk, from one byte to 64 KiB.
    server = start_server(dispatch=dispatch, threads=1, max_buffer_memory=1 << 16)
    with contextlib.ExitStack() as stack:
        clients = stuff_until_evicted(server, stack, 4)
        evicted = len(clients) - server.stats().active
        assert evicted >= 2
        for client in clients[:evicted]:  # the first have waited longest
            receive_until_reset(client)
    stats = server.stop()
    assert stats.errors.total == 0


def test_who_reads_is_not_reset_beside_those_who_do_not(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, threads=1, max_buffer_memory=1 << 16)
    with contextlib.ExitStack() as stack:
        stuff_until_evicted(server, stack, 2)
        data = plenty()[: 8 << 20]
        with connect(server) as reader:
            assert transfer(reader, data) == data
    assert server.stop(graceful_timeout=0).closed["eof"] == 1


def test_a_client_that_reads_slowly_is_spared_for_those_who_do_not_read(
    start_server: StartServer, dispatch: str
) -> None:
    """It has waited longest by what epoll reports, and is first in line."""
    server = start_server(dispatch=dispatch, threads=1, max_buffer_memory=192 << 10)
    ended = threading.Event()
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(stuffed(server))

        def read() -> None:
            while not ended.is_set() and reader.recv(8192):
                time.sleep(0.01)

        reading = threading.Thread(target=read)
        reading.start()
        try:
            stuff_until_evicted(server, stack, 2)
            reader.send(b"still connected")
        finally:
            ended.set()
            reading.join(DEADLINE_S)


def test_who_waits_alone_is_within_its_share(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, threads=4, max_buffer_memory=1 << 16)
    with stuffed(server):
        assert server.stats().closed["evicted"] == 0


def test_a_crowd_of_clients_that_never_read_is_bounded(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_buffer_memory=1 << 17)
    with contextlib.ExitStack() as stack, connect(server) as aside:
        block = plenty()[: 1 << 20]
        crowd = [stack.enter_context(connect(server, **SMALL)) for _ in range(100)]
        for client in crowd:
            client.setblocking(False)

        def have_been_reset() -> bool:
            for client in crowd:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    client.send(block)
            return server.stats().closed["evicted"] >= 10

        wait_for(have_been_reset, "the slowest are reset")
        assert echo(aside, b"still there") == b"still there"
    assert server.stop(graceful_timeout=0).errors.total == 0


# ---- idle_timeout -------------------------------------------------------------------------------


@pytest.mark.slow_under_sanitizers
@pytest.mark.parametrize(
    ("count", "timeout_s"),
    [(500, 1.5), pytest.param(18_000, 4.0, marks=[pytest.mark.alone, pytest.mark.release])],
)
def test_the_idle_timeout_is_right_for_all_connections(
    start_process: Callable[..., ServerProcess],
    dispatch: str,
    count: int,
    timeout_s: float,
    record_property: Callable[[str, object], None],
) -> None:
    with many_descriptors(count + 500), contextlib.ExitStack() as stack:
        options = ("--dispatch", dispatch, "--idle-timeout", str(timeout_s), "--backlog", "4096")
        port = start_process(*options).port
        waiting = stack.enter_context(contextlib.closing(select.epoll()))
        moved_s: dict[int, float] = {}
        rested_s = []
        clients = {}

        def look(patience_s: float) -> None:
            for fd, events in waiting.poll(patience_s, 4096):
                if events & select.EPOLLRDHUP:
                    rested_s.append(time.monotonic() - moved_s[fd])
                    clients.pop(fd).close()
                elif events & select.EPOLLIN:
                    assert clients[fd].recv(1) == b"x"
                    moved_s[fd] = time.monotonic()

        for _ in range(count):
            client = stack.enter_context(connect(port))
            clients[client.fileno()] = client
            moved_s[client.fileno()] = time.monotonic()
            waiting.register(client, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            client.send(b"x")
            look(0)
        end_s = time.monotonic() + timeout_s + DEADLINE_S
        while len(rested_s) < count and time.monotonic() < end_s:
            look(0.5)
        assert len(rested_s) == count
        record_property("idle_timeout_from_to_s", (min(rested_s), max(rested_s)))
        # The server counts from its own reading of the byte, this client from seeing it back.
        assert timeout_s - 1.0 < min(rested_s)
        assert max(rested_s) < timeout_s + 1.0

"""Clients that send their FIN and take what they are owed later, or never. Until then their
connections are the server's, and not orphans of the kernel."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

import kecho
from kecho import drop
from support.clients import (
    closed,
    connect,
    random_bytes,
    receive_until_end,
    receive_until_reset,
    reset,
    wait_for,
)
from support.fixture_types import StartServer
from support.namespaces import Namespace

pytestmark = [pytest.mark.privileged, pytest.mark.engines]

SIZE = 200_000
# With net.ipv4.tcp_orphan_retries=1 an orphan whose window is shut is reset after less.
READS_AFTER_S = 3.0
ORPHANED = {"fin-wait-1", "fin-wait-2", "closing", "last-ack"}


@pytest.fixture
def impatient(inside: Namespace) -> Namespace:
    """Orphans are probed once."""
    inside.set("net.ipv4.tcp_orphan_retries", 1)
    return inside


@contextlib.contextmanager
def half_closed(server: kecho.Server | int, data: bytes) -> Iterator[socket.socket]:
    """A client that has sent the data and its FIN, and has read nothing."""
    with connect(server, receive_buffer=4096) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        yield client


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("idle_timeout", [None, 0.5])
def test_every_byte_comes_however_late_it_is_read(
    start_server: StartServer, dispatch: str, idle_timeout: float | None
) -> None:
    """A client that is owed something is not idle."""
    server = start_server(dispatch=dispatch, idle_timeout=idle_timeout)
    data = random_bytes(SIZE)
    with half_closed(server, data) as client:
        wait_for(lambda: server.stats().bytes_sent == SIZE, "all was handed to the kernel")
        time.sleep(READS_AFTER_S)
        assert server.stats().active == 1
        assert receive_until_end(client) == data
    wait_for(lambda: server.stats().active == 0, "it has ended")
    assert server.stop().closed == closed(eof=1)


@pytest.mark.usefixtures("impatient")
def test_a_stop_waits_for_what_is_not_acknowledged(
    start_server: StartServer, dispatch: str
) -> None:
    """Of those that sent their FIN, and of those that did not."""
    server = start_server(dispatch=dispatch)
    data = random_bytes(SIZE)
    with (
        half_closed(server, data) as first,
        connect(server, receive_buffer=4096) as second,
    ):
        second.sendall(data)
        wait_for(lambda: server.stats().bytes_sent == 2 * SIZE, "all was handed to the kernel")
        stopping = threading.Thread(target=server.stop, kwargs={"graceful_timeout": 30})
        stopping.start()
        time.sleep(READS_AFTER_S)
        assert stopping.is_alive()
        assert receive_until_end(first) == data
        assert receive_until_end(second) == data
        stopping.join(10)
        assert not stopping.is_alive()
    assert server.stats().closed == closed(eof=1, drained=1)


@pytest.mark.usefixtures("inside")
def test_who_does_not_take_a_byte_for_so_long_is_reset(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, write_timeout=0.5)
    with half_closed(server, random_bytes(SIZE)) as client:
        wait_for(lambda: server.stats().closed.total == 1, "it is closed")
        receive_until_reset(client)
    assert server.stop().closed == closed(stalled=1)


@pytest.mark.usefixtures("inside")
def test_a_stop_without_grace_ends_with_fin_where_all_was_echoed(
    start_server: StartServer, dispatch: str
) -> None:
    """Though it is not acknowledged yet: a client that reads at its leisure delays that."""
    server = start_server(dispatch=dispatch)
    data = random_bytes(SIZE)
    with connect(server, receive_buffer=4096) as client:
        client.sendall(data)
        wait_for(lambda: handed_to_tcp(server, client) == SIZE, "all was handed to the kernel")
        assert server.stop(graceful_timeout=0).closed == closed(drained=1)
        assert receive_until_end(client) == data


def handed_to_tcp(server: kecho.Server, client: socket.socket) -> int:
    """What the client's kernel has, or the server's socket holds for it: with --engine sockmap the
    kernel has counted bytes as sent that may still wait for its own work."""
    received = int.from_bytes(fcntl.ioctl(client, termios.FIONREAD, bytes(4)), sys.byteorder)
    ends = drop.find(local=[f":{server.port}"], states=["established"])
    return received + sum(one.send_queue for one in ends)


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.release)])
def test_they_count_as_connections_until_they_have_taken_everything(
    inside: Namespace, start_server: StartServer, dispatch: str, count: int
) -> None:
    server = start_server(dispatch=dispatch, max_connections=10, backlog=4096)
    most, clients = 0, []
    try:
        for _ in range(count):
            client = connect(server, receive_buffer=4096)
            clients.append(client)
            client.settimeout(0.01)
            with contextlib.suppress(TimeoutError):  # of one that is not accepted yet
                client.sendall(bytes(150_000))
            client.shutdown(socket.SHUT_WR)
            most = max(most, held_by(server))
        wait_for(lambda: server.stats().active == 10, "as many as may be are served")
        time.sleep(1)
        assert max(most, held_by(server)) <= 10
    finally:
        for client in clients:
            reset(client)


def held_by(server: kecho.Server) -> int:
    """Its connections, and orphans; not those that wait in its accept queue."""
    found = drop.find(local=[f":{server.port}"])
    return sum(one.state in ORPHANED for one in found) + sum(
        one.state in ("established", "close-wait") and one.inode != 0 for one in found
    )

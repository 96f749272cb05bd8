"""Limits: max_connections and idle_timeout."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.clients import (
    DEADLINE_S,
    answered,
    connect,
    connected,
    echo,
    plenty,
    random_bytes,
    receive_exactly,
    receive_until_end,
    receive_until_reset,
    reset,
    send_until_blocked,
    transfer,
    wait_for,
    wait_until_delivered,
)
from support.fixture_types import StartServer

pytestmark = pytest.mark.engines(sanitized=True, dispatch=True)


# ---- max_connections ------------------------------------------------------------------------


def test_clients_beyond_max_connections_wait_for_room(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_connections=3)
    with connected(server, 3) as inside:
        assert [echo(client, b"inside") for client in inside] == [b"inside"] * 3
        with connected(server, 2) as waiting:
            for client in waiting:
                client.sendall(b"waiting")
            wait_until_delivered(*waiting)
            assert answered(waiting, within_s=0.3) == []
            stats = server.stats()
            assert (stats.accepted, stats.active) == (3, 3)
            assert stats.accept_pauses >= 1
            assert [echo(client, b"inside") for client in inside] == [b"inside"] * 3

            inside[0].close()
            wait_for(lambda: answered(waiting), "one more is served")
            time.sleep(0.2)
            assert len(answered(waiting)) == 1
            stats = server.stats()
            assert (stats.accepted, stats.active) == (4, 3)
            reset(inside[1])
            wait_for(lambda: len(answered(waiting)) == 2, "the other one is served")
            assert [receive_exactly(client, 7) for client in waiting] == [b"waiting"] * 2
            assert [echo(client, b"inside") for client in [*waiting, inside[2]]] == [b"inside"] * 3
    stats = server.stop()
    assert stats.accepted == stats.closed.total == 5
    assert stats.errors.total == 0


@pytest.mark.parametrize("most", [1, 4])
def test_never_more_than_max_connections_are_served_at_once(
    start_server: StartServer, dispatch: str, most: int
) -> None:
    server = start_server(dispatch=dispatch, max_connections=most)
    lock = threading.Lock()
    inside = 0
    insides: list[int] = []

    def visit(number: int) -> None:
        nonlocal inside
        with connect(server) as client:
            assert echo(client, b"in") == b"in"
            with lock:
                inside += 1
                insides.append(inside)
            message = random_bytes(2000, seed=number)
            assert echo(client, message) == message
            with lock:
                inside -= 1
            if number % 3 == 0:
                reset(client)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, range(200)))
    assert 1 <= max(insides) <= most
    wait_for(lambda: server.stats().active == 0, "all of them have left")
    stats = server.stop()
    assert stats.accepted == stats.closed.total == 200
    assert stats.errors.total == 0


def test_a_client_that_waits_for_room_may_leave(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, max_connections=1)
    with connect(server) as inside:
        assert echo(inside, b"inside") == b"inside"
        for _ in range(10):
            reset(connect(server))
            connect(server).close()
        last = connect(server)
        last.sendall(b"last")
        assert echo(inside, b"inside") == b"inside"
    with last:
        assert receive_exactly(last, 4) == b"last"
    wait_for(lambda: server.stats().active == 0, "all of them have left")
    stats = server.stop()
    assert stats.accepted == stats.closed.total


def test_max_connections_counts_all_listeners_together(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    server = start_server(
        dispatch=dispatch, max_connections=2, host=("127.0.0.1", "127.0.0.2"), uds=tmp_path / "s"
    )
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(connect(address))  # type: ignore[arg-type]
            for address in server.addresses
            for _ in range(2)
        ]
        for client in clients:
            client.sendall(b"hello")
        left = list(clients)
        while left:
            wait_for(lambda: answered(left), "somebody is served")
            now = answered(left, within_s=0.1)
            assert len(now) <= 2
            for client in now:
                assert receive_exactly(client, 5) == b"hello"
                client.close()
                left.remove(client)
    wait_for(lambda: server.stats().active == 0, "all of them have left")
    assert server.stop().accepted == 6


@pytest.mark.parametrize("grace_s", [0, DEADLINE_S])
def test_stop_serves_those_who_still_wait_for_room(
    start_server: StartServer,
    dispatch: str,
    grace_s: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beyond max_connections: the queues are no longer than the backlogs."""
    hosts = ("127.0.0.1", "127.0.0.2")
    server = start_server(
        dispatch=dispatch, max_connections=1, host=hosts, uds=tmp_path / "s", backlog=20
    )
    with connect(server) as inside, contextlib.ExitStack() as stack:
        assert echo(inside, b"inside") == b"inside"
        waiting = [
            stack.enter_context(connect(address))  # type: ignore[arg-type]
            for address in server.addresses
            for _ in range(5)
        ]
        for number, client in enumerate(waiting):
            client.sendall(b"%d" % number)
        wait_until_delivered(*(one for one in waiting if one.family != socket.AF_UNIX))
        stats = server.stop(graceful_timeout=grace_s)
        assert inside.recv(1) == b""
        answers = [receive_until_end(client) for client in waiting]
    assert answers == [b"%d" % number for number in range(15)]
    assert stats.accepted == stats.closed["drained"] == 16
    assert stats.active == 0
    assert not caplog.records


def test_an_abort_says_how_many_waited_to_be_accepted(
    start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(dispatch=dispatch, max_connections=1)
    with connect(server) as inside, connected(server, 7) as waiting:
        assert echo(inside, b"inside") == b"inside"
        server.abort()
        assert server.wait(DEADLINE_S)
        for client in (inside, *waiting):
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert [one.getMessage() for one in caplog.records] == [
        "7 clients that waited to be accepted when the server stopped are reset: the server was "
        "told to stop at once"
    ]


# ---- idle_timeout ---------------------------------------------------------------------------


def test_an_idle_connection_is_closed_with_end_of_file(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=0.4)
    with connected(server, 5) as clients:
        for client in clients[:3]:
            assert echo(client, b"hello") == b"hello"
        began_s = time.monotonic()
        assert [client.recv(1) for client in clients] == [b""] * 5
        assert 0.3 < time.monotonic() - began_s < 1.4
    stats = server.stop()
    assert stats.closed["idle"] == stats.accepted == 5
    assert stats.active == 0


def test_an_active_connection_is_not_idle(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=0.6)
    with connect(server) as idle, connected(server, 4) as active:
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            assert [echo(client, b".") for client in active] == [b"."] * 4
            time.sleep(0.05)
        assert idle.recv(1) == b""
        wait_for(lambda: server.stats().active == 4, "it is gone")
        assert server.stats().closed["idle"] == 1


def test_an_idle_client_that_never_reads_is_reset(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=1.0)
    with connect(server, receive_buffer=4096) as silent:
        sent = send_until_blocked(silent, plenty(), quiet_s=0.2)  # less than the timeout
        wait_for(lambda: server.stats().closed["idle"] == 1, "it is closed")
        received = receive_until_reset(silent)
        assert len(received) < sent
        assert received == plenty()[: len(received)]
    assert server.stop().active == 0


def test_idle_connections_are_closed_while_others_are_busy(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=0.5)
    payload = random_bytes(1 << 20)
    stop = threading.Event()

    def stream() -> int:
        rounds = 0
        while not stop.is_set():
            with connect(server) as client:
                assert transfer(client, payload) == payload
            rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(stream) for _ in range(3)]
        try:
            with connected(server, 20) as idle:
                assert [client.recv(1) for client in idle] == [b""] * 20
        finally:
            stop.set()
        rounds = [one.result(DEADLINE_S) for one in streams]
    wait_for(lambda: server.stats().active == 0, "the streams have ended")
    stats = server.stop()
    assert stats.closed["idle"] == 20
    assert stats.closed["eof"] == sum(rounds)


def test_idle_timeout_and_max_connections_make_room(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=0.3, max_connections=2)
    with connected(server, 2) as idle, connect(server) as waiting:
        assert echo(waiting, b"at last") == b"at last"
        assert [client.recv(1) for client in idle] == [b""] * 2


def test_an_idle_unix_connection_is_closed(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=0.3, uds=tmp_path / "s")
    with connect(server) as client:
        assert echo(client, b"hello") == b"hello"
        assert client.recv(1) == b""
    assert server.stop().closed["idle"] == 1

"""Limits: max_connections, idle_timeout, descriptors, the backlog."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kecho
from clients import (
    DEADLINE_S,
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
from kecho.tuning import somaxconn
from processes import ServerProcess, after

pytestmark = pytest.mark.engines(sanitized=True)

StartServer = Callable[..., kecho.Server]
StartProcess = Callable[..., ServerProcess]


def answered(clients: Sequence[socket.socket], within_s: float = 0.0) -> list[socket.socket]:
    """Those among `clients` that have something to read."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(within_s)]  # type: ignore[misc]


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
    server = start_server(dispatch=dispatch, idle_timeout=0.5)
    with connect(server, receive_buffer=4096) as silent:
        sent = send_until_blocked(silent, plenty())
        wait_for(lambda: server.stats().closed["idle"] == 1, "it is closed", deadline_s=2)
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


# ---- descriptors ----------------------------------------------------------------------------


def processor_time_s(pid: int) -> float:
    """User and system time: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.e2e
def test_a_server_without_descriptors_waits_and_goes_on(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2", "--log-format", "json")
    room = 20
    used = len(os.listdir(f"/proc/{process.pid}/fd"))
    limit = used + room
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    with connected(process.port, 3 * room) as clients:
        for number, client in enumerate(clients):
            client.sendall(b"%4d" % number)
        wait_until_delivered(*clients)
        wait_for(lambda: len(answered(clients)) == room, "as many are served as there is room for")
        used_before_s = processor_time_s(process.pid)
        assert len(answered(clients, within_s=0.1)) == room
        time.sleep(2)
        # 5 %, and two clock ticks; a worker that spins would use all of it.
        assert processor_time_s(process.pid) - used_before_s < 0.05 * 2 + 0.02
        assert len(answered(clients)) == room

        everybody = dict(zip(clients, range(len(clients)), strict=True))
        while everybody:
            wait_for(lambda: answered(list(everybody)), "somebody is served")
            for client in answered(list(everybody)):
                assert receive_exactly(client, 4) == b"%4d" % everybody.pop(client)
                assert echo(client, b"more") == b"more"
                client.close()
    with connect(process.port) as client:
        assert echo(client, b"next") == b"next"
    assert process.stop() == 0
    final = json.loads(process.stderr.splitlines()[-1])["stats"]
    assert final["errors"]["descriptors"] > 0
    assert process.stderr.count("no descriptor is left for another client") == 1
    assert final["accepted"] == final["closed"]["eof"] == 3 * room + 1


@pytest.mark.e2e
def test_more_connections_than_there_are_descriptors_for_are_said_to_be_too_many(
    start_process: StartProcess, dispatch: str
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = start_process("--dispatch", dispatch, "--max-connections", str(hard))
    process.wait_until_said(rf"warning: max-connections: {hard} are more than the \d+ that RLIMIT")
    assert process.stop() == 0
    quiet = start_process("--dispatch", dispatch, "--max-connections", "100")
    assert quiet.stop() == 0
    assert "RLIMIT" not in quiet.stderr


@pytest.mark.e2e
def test_as_many_connections_as_are_said_to_be_left_are_served(
    start_process: StartProcess, dispatch: str
) -> None:
    """Though each of many workers takes an epoll set, an eventfd and sockets."""
    limit = after("resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))")
    arguments = ["--dispatch", dispatch, "--threads=24", "--udp", "--log-level=debug"]
    with ServerProcess(arguments, before=limit) as process:
        process.wait_until_listening()
        said = re.search(r"at most 256, some (\d+) connections", process.stderr)
        assert said, process.stderr
        left = int(said[1])
        assert left > 100
        with connected(process.port, left) as clients:
            assert [echo(client, b"hello") for client in clients] == [b"hello"] * left
        assert process.stop() == 0
    assert "no descriptor is left" not in process.stderr


@pytest.mark.e2e
def test_a_server_whose_descriptors_are_freed_by_somebody_else_goes_on(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    limit = len(os.listdir(f"/proc/{process.pid}/fd"))
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))
    with connect(process.port) as client:
        client.sendall(b"hello")
        assert answered([client], within_s=0.3) == []
        # No connection of the server ends: nothing but time tells it to try again.
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit + 5, hard))
        assert receive_exactly(client, 5) == b"hello"
    assert process.stop() == 0


@pytest.mark.e2e
def test_a_server_without_descriptors_still_stops(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    with connect(process.port) as inside:
        assert echo(inside, b"inside") == b"inside"
        limit = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with connected(process.port, 3):
            assert echo(inside, b"still here") == b"still here"
            assert process.stop() == 0
            assert receive_until_end(inside) == b""


# ---- backlog --------------------------------------------------------------------------------


def backlogs(server: kecho.Server) -> list[int]:
    """What the kernel has in force for each listening socket of the server, found among the
    descriptors of this process: tcpi_sacked of a listener, tcp(7)."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        if "socket:" not in os.path.realpath(f"/proc/self/fd/{name}"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.family == socket.AF_INET and one.getsockname()[1] == server.port:
                assert one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                found.append(struct.unpack_from("=8x6I", info)[5])
    return found


@pytest.mark.parametrize("backlog", [0, 1, 128, 1000])
def test_the_backlog_is_in_force(start_server: StartServer, dispatch: str, backlog: int) -> None:
    server = start_server(dispatch=dispatch, backlog=backlog)
    listeners = 1 if dispatch == "shared" else 2
    assert backlogs(server) == [min(backlog, somaxconn())] * listeners


def test_a_backlog_beyond_somaxconn_is_truncated_and_said(
    start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(dispatch=dispatch, backlog=somaxconn() + 1)
    assert set(backlogs(server)) == {somaxconn()}
    assert f"net.core.somaxconn={somaxconn()}" in caplog.text.replace(" = ", "=")


def test_no_more_clients_than_the_backlog_wait(start_server: StartServer, dispatch: str) -> None:
    backlog = 5
    server = start_server(dispatch=dispatch, backlog=backlog, max_connections=1)
    listeners = 1 if dispatch == "shared" else 2
    with connect(server) as inside, contextlib.ExitStack() as stack:
        assert echo(inside, b"inside") == b"inside"
        knocking = [stack.enter_context(socket.socket()) for _ in range(40)]
        for client in knocking:
            client.setblocking(False)
            client.connect_ex(server.addresses[0])
        time.sleep(0.3)
        waiting = [client for client in knocking if is_connected(client)]
        # The kernel takes one more than it is told, and a handshake under way beside.
        assert backlog <= len(waiting) <= listeners * (backlog + 2)
        assert echo(inside, b"inside") == b"inside"


def is_connected(client: socket.socket) -> bool:
    try:
        client.getpeername()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("backlog", [0, 1])
def test_a_small_backlog_serves_clients_one_after_another(
    start_server: StartServer, dispatch: str, backlog: int
) -> None:
    server = start_server(dispatch=dispatch, backlog=backlog)
    for _ in range(20):
        with connect(server) as client:
            assert transfer(client, b"hello") == b"hello"
    assert server.stop().accepted == 20

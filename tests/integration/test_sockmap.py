"""--engine sockmap: what is its own. What it shares with epoll, the tests with the mark `engines`
show under both."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kecho
from support.bpf import ECHOED, SYS_BPF, FlowRecords, bpf_objects, is_in_the_kernel
from support.clients import (
    DEADLINE_S,
    connect,
    connected,
    echo,
    random_bytes,
    receive_exactly,
    reset,
    wait_for,
    wait_until_delivered,
)
from support.engines import HANDED_OVER_BYTES, needs_sockmap
from support.fixture_types import StartProcess, StartServer
from support.privileges import is_root
from support.server_process import ServerProcess

needs_flow_records = pytest.mark.skipif(
    not is_root() or SYS_BPF < 0, reason="takes root, and the number of bpf(2)"
)
RING_RECORDS = (256 << 10) // 16  # KECHO_FLOW_REPORTS_BYTES by a header and a token


# ---- the kernel echoes ------------------------------------------------------------------------


@needs_sockmap
def test_established_connections_echo_while_the_server_is_stopped(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--engine", "sockmap", "--dispatch", dispatch)
    with connected(process.port, 10) as clients:
        for client in clients:
            client.sendall(b"before")
            assert receive_exactly(client, 6) == b"before"
        with process.paused():
            for client in clients:
                client.sendall(random_bytes(5000))
                assert receive_exactly(client, 5000) == random_bytes(5000)


@needs_sockmap
def test_the_kernel_echoes_everybody_of_a_burst(start_process: StartProcess, dispatch: str) -> None:
    """More than are accepted in a turn."""
    process = start_process("--engine", "sockmap", "--dispatch", dispatch, "--threads", "1")
    with contextlib.ExitStack() as stack:
        with process.paused():
            clients = stack.enter_context(connected(process.port, 100))
        for client in clients:
            assert echo(client, b"before") == b"before"
        with process.paused():
            for client in clients:
                assert echo(client, b"meanwhile") == b"meanwhile"


@needs_sockmap
@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_bytes_that_came_before_accept_are_echoed_before_those_that_come_at_it(
    start_process: StartProcess, dispatch: str, size: int
) -> None:
    """Clients send while nobody accepts, and go on while the server begins to."""
    process = start_process("--engine", "sockmap", "--dispatch", dispatch, "--threads", "2")
    rounds, payload = 20, random_bytes(20 * size)
    with contextlib.ExitStack() as stack:
        with process.paused():
            clients = stack.enter_context(connected(process.port, 8))
            for client in clients:
                client.sendall(payload[:size])

            def send_rest(client: socket.socket) -> None:
                for number in range(1, rounds):
                    client.sendall(payload[number * size : (number + 1) * size])

            senders = [threading.Thread(target=send_rest, args=(client,)) for client in clients]
            for sender in senders:
                sender.start()
        for client in clients:
            assert receive_exactly(client, len(payload)) == payload
        for sender in senders:
            sender.join(DEADLINE_S)


@needs_sockmap
def test_the_first_bytes_are_never_echoed_twice(start_server: StartServer, dispatch: str) -> None:
    """4 MiB at once right after connect(): the sender sends segments again as one, of which the
    first had arrived. About 1 in 20 came back with a segment twice before they were trimmed."""
    server = start_server(engine="sockmap", dispatch=dispatch)
    payload = random_bytes(4 << 20)
    for _ in range(60):
        with connect(server) as client:
            sent = send_what_fits(client, payload)
            client.shutdown(socket.SHUT_WR)
            assert receive_exactly(client, sent) == payload[:sent]
            assert client.recv(1) == b""


def send_what_fits(client: socket.socket, data: bytes) -> int:
    client.setblocking(False)
    try:
        return client.send(data)
    finally:
        client.settimeout(DEADLINE_S)


@needs_sockmap
def test_50_megabytes_and_a_half_close_come_back_byte_for_byte(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(engine="sockmap", dispatch=dispatch)
    part, parts = random_bytes(1 << 20), 50
    with connect(server) as client:

        def send() -> None:
            for _ in range(parts):
                client.sendall(part)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(parts):
            assert receive_exactly(client, len(part)) == part
        assert client.recv(1) == b""
        sender.join(DEADLINE_S)


@needs_sockmap
def test_many_half_closed_streams_come_back_byte_for_byte(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(engine="sockmap", dispatch=dispatch, backlog=300)
    payload = random_bytes(50_000)
    with connected(server, 200) as clients:
        for number, client in enumerate(clients):
            client.sendall(payload[number:])
            client.shutdown(socket.SHUT_WR)
        for number, client in enumerate(clients):
            assert receive_exactly(client, len(payload) - number) == payload[number:]
            assert client.recv(1) == b""
    wait_for(lambda: server.stats().active == 0, "all have ended")
    stats = server.stats()
    assert stats.closed["eof"] == 200
    assert stats.bytes_received == stats.bytes_sent == sum(50_000 - n for n in range(200))


# ---- endings ----------------------------------------------------------------------------------


def is_open(port: int, client: socket.socket) -> bool:
    """The server's side of a connection, whose descriptor may still be open when it is not."""
    ends = f":{port:04X} 0100007F:{client.getsockname()[1]:04X} "
    return ends in Path("/proc/net/tcp").read_text()


@needs_sockmap
def test_why_a_connection_broke_is_not_lost_when_the_timers_look_at_it_first(
    start_process: StartProcess, dispatch: str
) -> None:
    """One that was stopped looks at its timers before its events: epoll_wait is interrupted."""
    arguments = ("--engine", "sockmap", "--dispatch", dispatch, "--threads", "1")
    process = start_process(*arguments, "--write-timeout", "1", "--stats-interval=0.5")
    client = connect(process.port)
    assert echo(client, b"x") == b"x"
    with process.paused():
        reset(client)
        time.sleep(1.1)  # it has rested for so long that they look
    process.wait_until_said("closed reset=1")
    process.stop()


@needs_sockmap
def test_a_reset_right_behind_an_end_of_file_ends_a_connection_that_was_handed_over(
    start_process: StartProcess, dispatch: str
) -> None:
    arguments = ("--engine", "sockmap", "--dispatch", dispatch, "--threads", "1")
    process = start_process(*arguments, "--max-buffer-memory", "64K", "--max-connections", "1")
    client = connect(process.port)
    assert echo(client, bytes(HANDED_OVER_BYTES)) == bytes(HANDED_OVER_BYTES)
    with process.paused():
        client.shutdown(socket.SHUT_WR)
        reset(client)
    with connect(process.port) as following:
        assert echo(following, b"there is room") == b"there is room"


@contextlib.contextmanager
def new_flow(
    process: ServerProcess, records: FlowRecords, first_bytes: int
) -> Iterator[tuple[socket.socket, int]]:
    """A client that has had so many bytes echoed, and the key of its record."""
    before = records.keys()
    with connect(process.port) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert echo(client, bytes(first_bytes)) == bytes(first_bytes)
        (key,) = records.keys() - before
        yield client, key


@needs_sockmap
@needs_flow_records
@pytest.mark.parametrize("first_bytes", [1, HANDED_OVER_BYTES])
def test_a_flow_that_has_lost_bytes_is_reset(
    start_process: StartProcess, dispatch: str, first_bytes: int
) -> None:
    """Though there is nothing to be read of it, by which epoll would report it."""
    arguments = ("--engine", "sockmap", "--dispatch", dispatch, "--max-buffer-memory", "64K")
    process = start_process(*arguments)
    with (
        FlowRecords(process.pid) as records,
        new_flow(process, records, first_bytes) as (client, key),
    ):
        records.lose_a_byte(key)
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    process.stop()
    assert "closed error=1, errors memory=1" in process.stderr


def fill_the_ring(records: FlowRecords, key: int, client: socket.socket) -> None:
    """This flow is told of again and again, while nobody reads the ring. It will be reset."""
    flow = records.lose_a_byte(key)
    for _ in range(RING_RECORDS):
        flow.mode = ECHOED
        records.write(key, flow)
        client.send(b"x")


@needs_sockmap
@needs_flow_records
def test_a_flow_that_has_lost_bytes_is_reset_if_the_ring_had_no_room_for_it(
    start_process: StartProcess, dispatch: str
) -> None:
    """One that had been handed over: nothing else looks at it."""
    arguments = ("--engine", "sockmap", "--dispatch", dispatch, "--max-buffer-memory", "64K")
    process = start_process(*arguments)
    with (
        FlowRecords(process.pid) as records,
        new_flow(process, records, 1) as (filling, its_key),
        new_flow(process, records, HANDED_OVER_BYTES) as (client, key),
    ):
        with process.paused():
            fill_the_ring(records, its_key, filling)
            records.lose_a_byte(key)
            client.sendall(b"x")
        for one in (filling, client):
            with pytest.raises(ConnectionResetError):
                one.recv(1)


@needs_sockmap
@needs_flow_records
def test_flows_for_which_the_ring_has_no_room_are_echoed_to_the_end(
    start_process: StartProcess, dispatch: str
) -> None:
    """All of them outrun the kernel while nobody reads the ring, and send nothing afterwards."""
    arguments = ("--engine", "sockmap", "--dispatch", dispatch)
    process = start_process(*arguments, "--max-buffer-memory", "64K")
    size = 70_000  # more than the least that the kernel queues for one
    with (
        FlowRecords(process.pid) as records,
        new_flow(process, records, 1) as (filling, its_key),
        connected(process.port, 300) as clients,
    ):
        for client in clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # nothing follows later
            assert echo(client, b"x") == b"x"  # the kernel has it
        with process.paused():
            fill_the_ring(records, its_key, filling)
            for client in clients:
                client.sendall(bytes(size))
            wait_until_delivered(*clients)
        left = dict.fromkeys(clients, size)

        def is_all_there() -> bool:
            for client in [client for client in clients if left[client] > 0]:
                try:
                    left[client] -= len(client.recv(size, socket.MSG_DONTWAIT))
                except BlockingIOError:
                    continue
                except ConnectionResetError:  # too slow for --max-buffer-memory
                    left[client] = 0
            return not any(left.values())

        wait_for(is_all_there, "every client has its bytes, or is reset")


# ---- nothing remains --------------------------------------------------------------------------


@needs_sockmap
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_remains_in_the_kernel(start_process: StartProcess, number: int) -> None:
    process = start_process("--engine", "sockmap")
    with connect(process.port) as client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
        objects = bpf_objects(process.pid)  # what it has closed is held by one of these
        assert {kind for kind, _ in objects} == {"map", "prog"}
        assert all(is_in_the_kernel(*one) for one in objects)
        os.kill(process.pid, number)
        process.process.wait(DEADLINE_S)
    # Freed after an RCU grace period.
    wait_for(lambda: not any(is_in_the_kernel(*one) for one in objects), "all of it is gone")


@needs_sockmap
def test_no_descriptor_is_left_after_stop(dispatch: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with kecho.Server(port=0, engine="sockmap", dispatch=dispatch) as server:
            assert server.engine == "sockmap"
            with connect(server) as client:
                client.sendall(b"x")
                assert receive_exactly(client, 1) == b"x"
        assert len(os.listdir("/proc/self/fd")) == before
        assert not bpf_objects("self")

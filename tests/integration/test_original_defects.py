"""What the kernel module that kecho replaces got wrong, defect by defect."""

from __future__ import annotations

import os
import resource
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import kecho
from support.clients import (
    DEADLINE_S,
    connect,
    connected,
    echo,
    random_bytes,
    receive_exactly,
    reset,
    transfer,
    wait_for,
    wait_until_delivered,
)
from support.fixture_types import StartProcess, StartServer

pytestmark = pytest.mark.engines

# <linux/in.h>; the socket module has it from 3.12 on
IP_BIND_ADDRESS_NO_PORT = 24


@pytest.fixture(autouse=True, scope="module")
def descriptors() -> Iterator[None]:
    """Both ends of thousands of connections are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def needs_descriptors(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"needs {count} descriptors, the hard limit is {hard}")


def test_bytes_after_a_nul_come_back(server: kecho.Server) -> None:
    with connect(server) as client:
        for message in (b"\0", b"a\0b", b"\0" * 512, b"before\0after" * 1000):
            assert echo(client, message) == message
        assert transfer(client, bytes(100_000)) == bytes(100_000)


@pytest.mark.parametrize("size", [511, 512, 513, 1024, 4096, 30_000])
def test_a_message_of_more_than_512_bytes_comes_back_whole(server: kecho.Server, size: int) -> None:
    message = random_bytes(size)
    with connect(server) as client:
        for _ in range(20):
            assert echo(client, message) == message


def test_two_thousand_connections_are_all_served(start_server: StartServer, dispatch: str) -> None:
    needs_descriptors(4500)
    server = start_server(dispatch=dispatch, backlog=2000)
    with connected(server, 2000) as clients:
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(b"%d:%d" % (turn, number))
            for number, client in enumerate(clients):
                message = b"%d:%d" % (turn, number)
                assert receive_exactly(client, len(message)) == message
        stats = server.stats()
        assert stats.active == stats.accepted == 2000
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    assert server.stop().closed["eof"] == 2000


@contextmanager
def burst(server: kecho.Server, count: int) -> Iterator[list[socket.socket]]:
    """Clients that all connect at the same moment, and may not have got through yet."""
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(count)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.addresses[0])
        yield clients


def wait_for_everybody(clients: list[socket.socket], deadline_s: float) -> None:
    """Has each client send its own message as soon as it can, and get it back."""
    messages = {client: b"%6d" % number for number, client in enumerate(clients)}
    waiting = set(clients)
    end_s = time.monotonic() + deadline_s
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_WRITE)
        while waiting:
            assert time.monotonic() < end_s, f"{len(waiting)} clients are not served"
            for key, ready in selector.select(1):
                client = key.fileobj
                assert isinstance(client, socket.socket)
                if ready & selectors.EVENT_WRITE:
                    client.sendall(messages[client])
                    selector.modify(client, selectors.EVENT_READ)
                else:
                    assert client.recv(100) == messages[client]
                    selector.unregister(client)
                    waiting.remove(client)


def test_a_burst_of_connects_does_not_wedge_the_server(
    start_server: StartServer, dispatch: str
) -> None:
    needs_descriptors(2500)
    server = start_server(dispatch=dispatch, backlog=128)
    with burst(server, 1000) as clients:
        # Who finds no room tries again after 1, 3, 7, 15 s: slow is fine, never is not.
        wait_for_everybody(clients, 2 * DEADLINE_S)
        with connect(server) as client:
            client.settimeout(0.9)  # at once: no SYN was dropped
            assert echo(client, b"next") == b"next"
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    stats = server.stop()
    assert stats.accepted == stats.closed.total == 1001
    assert stats.errors.total == 0


def test_a_burst_of_connects_is_no_shortage(start_server: StartServer, dispatch: str) -> None:
    needs_descriptors(2500)
    server = start_server(dispatch=dispatch, backlog=4096, threads=4)
    for _ in range(5):
        with burst(server, 1000) as clients:
            wait_for_everybody(clients, DEADLINE_S)
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    stats = server.stop()
    assert stats.accepted == 5000
    assert stats.accept_pauses == 0


@pytest.mark.parametrize(
    "count",
    [2000, pytest.param(50_000, marks=[pytest.mark.release, pytest.mark.slow_under_sanitizers])],
)
def test_connections_one_after_another_leave_nothing(server: kecho.Server, count: int) -> None:
    def visit(number: int) -> None:
        client = socket.socket()
        client.settimeout(DEADLINE_S)
        # A hundred addresses, and a port is only taken on connect, by destination: ip(7).
        client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        client.bind((f"127.0.1.{number % 100}", 0))
        client.connect(server.addresses[0])
        message = b"%d" % number
        assert echo(client, message) == message
        if number % 4 == 0:
            client.close()
        else:
            reset(client)

    for number in range(500):
        visit(number)
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    descriptors, resident = descriptor_count(), resident_bytes()
    for number in range(count):
        visit(number)
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    assert descriptor_count() == descriptors
    assert resident_bytes() - resident < 8 << 20
    stats = server.stop()
    assert stats.accepted == stats.closed.total == count + 500
    assert stats.closed["eof"] + stats.closed["reset"] == count + 500
    assert stats.errors.total == 0


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_stop_with_300_idle_clients_is_not_late(server: kecho.Server) -> None:
    with connected(server, 300) as clients:
        assert [echo(client, b"hello") for client in clients] == [b"hello"] * 300
        began_s = time.monotonic()
        stats = server.stop(graceful_timeout=5)
        assert time.monotonic() - began_s < 5
        assert [client.recv(1) for client in clients] == [b""] * 300
    assert stats.closed["drained"] == 300


@pytest.mark.e2e
def test_sigterm_with_300_idle_clients_is_obeyed_in_time(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--graceful-timeout", "5", "--backlog", "300")
    with connected(process.port, 300) as clients:
        assert [echo(client, b"hello") for client in clients] == [b"hello"] * 300
        began_s = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began_s < 5
        assert [client.recv(1) for client in clients] == [b""] * 300


def test_a_reset_does_not_end_the_server(server: kecho.Server) -> None:
    with connect(server) as bystander:
        for number in range(200):
            client = connect(server)
            if number % 2:
                client.sendall(random_bytes(20_000))
            reset(client)
        assert echo(bystander, b"still here") == b"still here"
        with connect(server) as client:
            assert transfer(client, b"next") == b"next"
    assert server.is_running
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    assert server.stop().errors.total == 0


def in_time_wait(port: int) -> int:
    """How many connections of this port are in TIME_WAIT: proc_net(5), state 06."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(line[1] == f"0100007F:{port:04X}" and line[3] == "06" for line in lines)


def test_the_port_can_be_bound_again_at_once(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch)
    port = server.port
    for _ in range(3):
        with connected(port, 5) as clients:
            assert [echo(client, b"hello") for client in clients] == [b"hello"] * 5
            server.stop()  # first to close, so the server's side keeps TIME_WAIT
            assert [client.recv(1) for client in clients] == [b""] * 5
        assert in_time_wait(port) > 0
        server = start_server(dispatch=dispatch, port=port)
        assert server.port == port


@pytest.mark.e2e
def test_many_messages_of_one_readiness_edge_are_all_answered(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    with connected(process.port, 4) as clients:
        for client in clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            assert echo(client, b"x") == b"x"
        for size in (1, 100, 1000):
            messages = [random_bytes(size, seed=number) for number in range(100)]
            with process.paused():
                for client in clients:
                    for message in messages:
                        client.sendall(message)
                wait_until_delivered(*clients)
            for client in clients:
                assert receive_exactly(client, 100 * size) == b"".join(messages)
    assert process.stop() == 0


@pytest.mark.e2e
def test_more_of_one_readiness_edge_than_a_turn_takes_is_all_answered(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    payload = random_bytes(8 << 20)
    with connected(process.port, 3) as clients:
        for client in clients:
            # The kernel gives a socket that was read from more room.
            for start in range(0, len(payload), 1 << 18):
                piece = payload[start : start + (1 << 18)]
                assert echo(client, piece) == piece
        with process.paused():
            sent = [send_what_fits(client, payload) for client in clients]
        assert min(sent) > 4 * 65536
        for client, size in zip(clients, sent, strict=True):
            assert receive_exactly(client, size) == payload[:size]
    assert process.stop() == 0


def send_what_fits(client: socket.socket, data: bytes) -> int:
    sent = 0
    client.setblocking(False)
    try:
        while sent < len(data):
            sent += client.send(data[sent:])
    except BlockingIOError:
        pass
    client.settimeout(DEADLINE_S)
    return sent


def test_pipelined_messages_are_all_answered(server: kecho.Server) -> None:
    messages = [b"%d;" % number for number in range(20_000)]
    with connect(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(messages), 200):
            for message in messages[start : start + 200]:
                client.sendall(message)
            expected = b"".join(messages[start : start + 200])
            assert receive_exactly(client, len(expected)) == expected

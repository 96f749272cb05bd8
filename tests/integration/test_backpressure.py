"""A client that does not read is not read from; it harms nobody and loses nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import kecho
from support.clients import (
    connect,
    connected,
    echo,
    plenty,
    random_bytes,
    receive_exactly,
    receive_until_end,
    reset,
    send_until_blocked,
    wait_for,
)
from support.fixture_types import StartProcess, StartServer

pytestmark = pytest.mark.engines(sanitized=True)

BUFFER = 65536  # what the server keeps at most of a connection
MIB = 1 << 20


def wait_until_blocked(client: socket.socket, server: kecho.Server) -> int:
    """Sends until neither the client nor the server gets on; returns the bytes sent."""
    sent = send_until_blocked(client, plenty())
    wait_until_quiet(server)
    assert server.stats().backpressure > 0
    return sent


def wait_until_quiet(server: kecho.Server) -> None:
    def is_quiet() -> bool:
        before = server.stats()
        time.sleep(0.1)
        later = server.stats() - before
        return later.bytes_received == later.bytes_sent == 0

    wait_for(is_quiet, "no more bytes move")


def wait_until_all_blocked(clients: Sequence[socket.socket]) -> list[int]:
    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(lambda client: send_until_blocked(client, plenty()), clients))


def send_rest_and_end(client: socket.socket, data: bytes) -> threading.Thread:
    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    return sender


def test_a_client_that_never_reads_is_not_read_from_any_more(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as client:
        sent = wait_until_blocked(client, server)
        blocked = server.stats()
        assert 0 < blocked.bytes_sent < blocked.bytes_received <= sent
        time.sleep(0.2)
        later = server.stats() - blocked
        assert (later.bytes_received, later.bytes_sent, later.backpressure) == (0, 0, 0)
        assert later.active == 1


def test_the_server_keeps_one_buffer_of_a_client_that_never_reads(server: kecho.Server) -> None:
    with connected(server, 5, receive_buffer=4096) as clients:
        wait_until_all_blocked(clients)
        wait_until_quiet(server)
        stats = server.stats()
        assert 0 < stats.bytes_received - stats.bytes_sent <= 5 * BUFFER


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers  # whose allocators keep what was freed
def test_memory_is_bounded_while_many_clients_never_read(
    start_process: StartProcess, dispatch: str
) -> None:
    def resident_bytes() -> int:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096

    process = start_process("--dispatch", dispatch, "--threads", "2", "--graceful-timeout", "0")
    with connect(process.port) as client:
        echo(client, b"x")
    before = resident_bytes()
    with connected(process.port, 40, receive_buffer=4096, send_buffer=65536) as clients:
        wait_until_all_blocked(clients)
        assert resident_bytes() - before < 40 * BUFFER + 4 * MIB
    assert process.stop() == 0


def test_nobody_else_notices_clients_that_never_read(server: kecho.Server) -> None:
    with connected(server, 6, receive_buffer=4096) as silent:
        wait_until_all_blocked(silent)
        with connected(server, 4) as others:
            for number in range(100):
                message = random_bytes(1 + 300 * number, seed=number)
                for client in others:
                    assert echo(client, message) == message
        assert server.stats().active >= 6


def test_clients_that_never_read_cost_no_processor_time(server: kecho.Server) -> None:
    with connected(server, 6, receive_buffer=4096) as clients:
        wait_until_all_blocked(clients)
        used_before_s = time.process_time()
        time.sleep(0.5)
        # A worker that spins would use all of the half second.
        assert time.process_time() - used_before_s < 0.25


def test_what_was_held_back_arrives_in_order_once_the_client_reads(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as client:
        for _ in range(3):
            sent = wait_until_blocked(client, server)
            assert receive_exactly(client, sent) == plenty()[:sent]
        assert echo(client, b"again") == b"again"
        client.shutdown(socket.SHUT_WR)
        assert receive_until_end(client) == b""
    stats = server.stop()
    assert stats.backpressure >= 3
    assert stats.bytes_received == stats.bytes_sent
    assert stats.closed["eof"] == 1


def test_a_client_that_begins_to_read_late_gets_everything(server: kecho.Server) -> None:
    payload = plenty()[: 48 * MIB]
    with connect(server, receive_buffer=4096) as client:
        sent = wait_until_blocked(client, server)
        sender = send_rest_and_end(client, payload[sent:])
        received = receive_until_end(client)
        sender.join()
    assert len(received) == len(payload)
    assert received == payload


@pytest.mark.slow_under_sanitizers  # the reader has to be slower than the server
@pytest.mark.parametrize("receive_buffer", [4096, 20_000, 65_536])
def test_a_slow_reader_gets_everything(server: kecho.Server, receive_buffer: int) -> None:
    payload = random_bytes(6 * MIB)
    with connect(server, receive_buffer=receive_buffer) as client:
        sender = send_rest_and_end(client, payload)
        received = bytearray()
        while chunk := client.recv(10_000):
            received += chunk
            if len(received) // MIB != (len(received) - len(chunk)) // MIB:
                time.sleep(0.03)
        sender.join()
    assert bytes(received) == payload
    assert server.stats().backpressure > 0


def test_a_half_close_under_backpressure_loses_nothing(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as client:
        sent = wait_until_blocked(client, server)
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.05)  # the server may now find the FIN, and must not take it for the end
        received = receive_until_end(client)
    assert len(received) == sent
    assert received == plenty()[:sent]
    wait_for(lambda: server.stats().closed["eof"] == 1, "the end is counted")


def test_a_reset_under_backpressure_ends_that_connection_alone(server: kecho.Server) -> None:
    with connect(server) as bystander, connect(server, receive_buffer=4096) as blocked_too:
        sent = wait_until_blocked(blocked_too, server)
        client = connect(server, receive_buffer=4096)
        wait_until_blocked(client, server)
        reset(client)
        wait_for(lambda: server.stats().active == 2, "that connection is gone")
        assert server.stats().closed["reset"] == 1
        assert echo(bystander, b"still here") == b"still here"
        assert receive_exactly(blocked_too, sent) == plenty()[:sent]
    wait_for(lambda: server.stats().active == 0, "the connections are gone")
    stats = server.stop()
    assert (stats.closed["reset"], stats.closed["eof"], stats.errors.total) == (1, 2, 0)


def test_a_close_under_backpressure_ends_the_connection(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as client:
        wait_until_blocked(client, server)
    # Unread data makes the kernel send a reset instead of an end: tcp(7).
    wait_for(lambda: server.stats().active == 0, "the connection is gone")
    assert server.stop().closed["reset"] == 1


def test_many_resets_under_backpressure_leave_nothing(server: kecho.Server) -> None:
    for _ in range(3):
        clients = [connect(server, receive_buffer=4096, send_buffer=65536) for _ in range(10)]
        wait_until_all_blocked(clients)
        for client in clients:
            reset(client)
    wait_for(lambda: server.stats().active == 0, "the connections are gone")
    with connect(server) as client:
        assert echo(client, b"next") == b"next"
    stats = server.stop()
    assert stats.closed["reset"] == 30
    assert stats.errors.total == 0


def test_half_of_the_clients_read_and_half_do_not(server: kecho.Server) -> None:
    payload = random_bytes(2 * MIB)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(server, receive_buffer=4096)) for _ in range(4)]
        sent = wait_until_all_blocked(silent)
        readers = [stack.enter_context(connect(server)) for _ in range(4)]
        senders = [send_rest_and_end(one, payload) for one in readers]
        assert [receive_until_end(one) for one in readers] == [payload] * 4
        for sender in senders:
            sender.join()
        for client, size in zip(silent, sent, strict=True):
            assert receive_exactly(client, size) == plenty()[:size]


def test_backpressure_on_a_unix_socket_loses_nothing(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    server = start_server(uds=str(tmp_path / "s"), dispatch=dispatch)
    with connect(server) as client, connect(server) as bystander:
        sent = wait_until_blocked(client, server)
        stats = server.stats()
        assert stats.bytes_received - stats.bytes_sent <= BUFFER
        assert echo(bystander, b"still here") == b"still here"
        client.shutdown(socket.SHUT_WR)
        received = receive_until_end(client)
        assert len(received) == sent
        assert received == plenty()[:sent]
    with connect(server) as client:
        wait_until_blocked(client, server)
    wait_for(lambda: server.stats().active == 0, "a client that went without reading is gone")

"""Every byte comes back, in order, whatever the bytes and however they are cut."""

from __future__ import annotations

import hashlib
import socket
import threading
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
    send_around_urgent,
    send_until_blocked,
    transfer,
    transfer_all,
    wait_for,
    wait_until_delivered,
)
from support.fixture_types import StartProcess, StartServer

pytestmark = pytest.mark.engines

BUFFER = 65536  # what the server reads at a time
MIB = 1 << 20


def exchange(client: socket.socket, data: bytes, piece: int | None = None) -> bytes:
    """transfer() without the half-close, for which an echo may not wait. piece: bytes a send."""

    def send() -> None:
        for start in range(0, len(data), piece or len(data)):
            client.sendall(data[start : start + (piece or len(data))])

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return receive_exactly(client, len(data))
    finally:
        sender.join()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(bytes(range(256)) * 3, id="every-value"),
        pytest.param(bytes(100_000), id="only-nul"),
        pytest.param(b"\xff" * 1000, id="only-ff"),
        pytest.param(b"\r\n\0\x04\x1a" * 50, id="line-ends"),
        pytest.param("naïve ☃".encode("utf-16"), id="utf-16"),
    ],
)
def test_bytes_of_any_value_come_back(server: kecho.Server, payload: bytes) -> None:
    with connect(server) as client:
        assert exchange(client, payload) == payload
        assert transfer(client, payload) == payload


def test_a_connection_without_bytes_gets_end_of_file(server: kecho.Server) -> None:
    with connect(server) as client:
        assert transfer(client, b"") == b""
    stats = server.stop()
    assert (stats.accepted, stats.closed["eof"], stats.bytes_received) == (1, 1, 0)


def test_end_of_file_is_answered_on_a_connection_that_was_waiting(server: kecho.Server) -> None:
    with connect(server) as client:
        wait_for(lambda: server.stats().active == 1, "the connection is served")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_single_bytes_come_back_one_at_a_time(server: kecho.Server) -> None:
    with connect(server) as client:
        for value in range(256):
            assert echo(client, bytes([value])) == bytes([value])


def test_single_bytes_sent_without_waiting_come_back(server: kecho.Server) -> None:
    payload = random_bytes(5000)
    with connect(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert exchange(client, payload, piece=1) == payload


@pytest.mark.parametrize(
    "size", [1, 2, 1447, BUFFER - 1, BUFFER, BUFFER + 1, 4 * BUFFER, 4 * BUFFER + 1, 5 * MIB + 3]
)
def test_messages_of_any_size_come_back(server: kecho.Server, size: int) -> None:
    payload = random_bytes(size)
    with connect(server) as client:
        for _ in range(3):
            assert exchange(client, payload) == payload
        assert transfer(client, payload) == payload


def test_messages_that_grow_and_shrink_come_back(server: kecho.Server) -> None:
    payload = random_bytes(2 * BUFFER)
    with connect(server) as client:
        for exponent in [*range(18), *reversed(range(18))]:
            assert exchange(client, payload[: 1 << exponent]) == payload[: 1 << exponent]


@pytest.mark.parametrize(
    "mebibytes", [20, pytest.param(200, marks=pytest.mark.slow_under_sanitizers)]
)
def test_a_long_stream_comes_back_unchanged(server: kecho.Server, mebibytes: int) -> None:
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send() -> None:
        for number in range(mebibytes):
            block = random_bytes(MIB, seed=number)
            sent.update(block)
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)

    size = 0
    with connect(server) as client:
        sender = threading.Thread(target=send)
        sender.start()
        while chunk := client.recv(MIB):
            received.update(chunk)
            size += len(chunk)
        sender.join()
    assert size == mebibytes * MIB
    assert received.digest() == sent.digest()
    stats = server.stop()
    assert stats.bytes_received == stats.bytes_sent == size


@pytest.mark.parametrize(
    "size_each",
    [100_003, pytest.param(200 * MIB // 64, marks=pytest.mark.slow_under_sanitizers)],
)
def test_64_streams_at_once_do_not_mix(server: kecho.Server, size_each: int) -> None:
    payloads = [random_bytes(size_each, seed=number) for number in range(64)]
    with connected(server, len(payloads)) as clients:
        received = transfer_all(clients, payloads)
    assert [len(one) for one in received] == [size_each] * len(payloads)
    assert received == payloads
    stats = server.stop()
    assert stats.closed["eof"] == stats.accepted == 64
    assert stats.bytes_received == stats.bytes_sent == 64 * size_each


@pytest.mark.parametrize("size", [1, 1000, BUFFER - 1, BUFFER, BUFFER + 1, 300_000])
def test_a_half_close_together_with_the_data_loses_nothing(server: kecho.Server, size: int) -> None:
    payload = random_bytes(size)
    for _ in range(20):
        with connect(server) as client:
            # The last segment of the data carries the FIN.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            assert transfer(client, payload) == payload
    stats = server.stop()
    assert stats.closed["eof"] == 20


def test_data_and_half_close_that_come_before_accept_are_answered(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    payloads = [random_bytes(size) for size in (0, 1, 1000, BUFFER, BUFFER + 1)]
    with process.paused():
        with_data = [connect(process.port) for _ in payloads]
        for client, payload in zip(with_data, payloads, strict=True):
            client.sendall(payload)
            client.shutdown(socket.SHUT_WR)
    for client, payload in zip(with_data, payloads, strict=True):
        with client:
            assert receive_until_end(client) == payload
    assert process.stop() == 0


def test_data_that_came_before_accept_comes_back_without_more(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    payloads = [random_bytes(size) for size in (1, BUFFER - 1, BUFFER, BUFFER + 1)]
    with process.paused():
        clients = [connect(process.port) for _ in payloads]
        for client, payload in zip(clients, payloads, strict=True):
            client.sendall(payload)
        wait_until_delivered(*clients[:3])
    for client, payload in zip(clients, payloads, strict=True):
        with client:
            assert receive_exactly(client, len(payload)) == payload
    assert process.stop() == 0


# ---- urgent data ----------------------------------------------------------------------------


def test_an_urgent_byte_comes_back_at_its_place(server: kecho.Server) -> None:
    with connect(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(100):
            expected = send_around_urgent(client)
            assert receive_exactly(client, len(expected)) == expected
        assert echo(client, b"later") == b"later"


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([("!", True)], id="alone"),
        pytest.param([("!", True), ("after", False)], id="first"),
        pytest.param([("before", False), ("!", True)], id="last"),
        pytest.param(
            [("a", False), ("!", True), ("b", False), ("?", True), ("c", False)], id="two"
        ),
        pytest.param([("!", True), ("?", True)], id="two-in-a-row"),
        pytest.param([("x" * 70_000, False), ("!", True), ("y" * 70_000, False)], id="long"),
        pytest.param([("x" * 65_536, False), ("!", True), ("y", False)], id="after-whole-buffer"),
    ],
)
def test_urgent_bytes_in_any_place_come_back(
    server: kecho.Server, pieces: list[tuple[str, bool]]
) -> None:
    expected = "".join(text for text, _ in pieces).encode()
    for half_close in (False, True):
        with connect(server) as client:
            for text, urgent in pieces:
                client.sendall(text.encode(), socket.MSG_OOB if urgent else 0)
            if half_close:
                client.shutdown(socket.SHUT_WR)
                assert receive_until_end(client) == expected
            else:
                assert receive_exactly(client, len(expected)) == expected


@pytest.mark.e2e
def test_data_behind_an_urgent_byte_between_two_reads_is_not_stalled(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    with connected(process.port, 8) as clients:
        for client in clients:
            assert echo(client, b"x") == b"x"
        for _ in range(3):
            with process.paused():
                expected = [send_around_urgent(client) for client in clients]
            assert [receive_exactly(one, len(expected[0])) for one in clients] == expected
    assert process.stop() == 0


@pytest.mark.e2e
def test_data_behind_an_urgent_byte_before_accept_is_not_stalled(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    with process.paused():
        client = connect(process.port)
        expected = send_around_urgent(client)
    with client:
        assert receive_exactly(client, len(expected)) == expected
    assert process.stop() == 0


def test_an_urgent_byte_that_comes_under_backpressure_is_at_its_place(
    server: kecho.Server,
) -> None:
    with connect(server, receive_buffer=4096) as client:
        sent = send_until_blocked(client, plenty())
        sender = threading.Thread(target=send_around_urgent, args=(client,))
        sender.start()
        assert receive_exactly(client, sent) == plenty()[:sent]
        assert receive_exactly(client, 12) == b"before!after"
        sender.join()


# ---- Unix sockets ---------------------------------------------------------------------------


@pytest.fixture
def unix_server(start_server: StartServer, dispatch: str, tmp_path: Path) -> kecho.Server:
    return start_server(uds=str(tmp_path / "s"), dispatch=dispatch)


def test_bytes_come_back_over_a_unix_socket(unix_server: kecho.Server) -> None:
    for size in (1, 256, BUFFER - 1, BUFFER, BUFFER + 1, 3 * MIB):
        payload = random_bytes(size)
        with connect(unix_server) as client:
            assert exchange(client, payload) == payload
            assert transfer(client, payload) == payload


def test_small_pieces_come_back_over_a_unix_socket(unix_server: kecho.Server) -> None:
    payload = random_bytes(4000)
    with connect(unix_server) as client:
        assert exchange(client, payload, piece=4) == payload


def test_many_streams_over_a_unix_socket_do_not_mix(unix_server: kecho.Server) -> None:
    payloads = [random_bytes(200_000, seed=number) for number in range(32)]
    with connected(unix_server, len(payloads)) as clients:
        assert transfer_all(clients, payloads) == payloads
    assert unix_server.stop().closed["eof"] == 32


def test_a_half_close_over_a_unix_socket_is_answered(unix_server: kecho.Server) -> None:
    with connect(unix_server) as client:
        assert transfer(client, b"") == b""
    with connect(unix_server) as client:
        assert transfer(client, b"last words") == b"last words"
    assert unix_server.stop().closed["eof"] == 2


def test_an_urgent_byte_over_a_unix_socket_comes_back_at_its_place(
    unix_server: kecho.Server,
) -> None:
    with connect(unix_server) as client:
        client.sendall(b"before")
        try:
            client.send(b"!", socket.MSG_OOB)
        except OSError as error:
            pytest.skip(f"the kernel has no urgent data on Unix sockets: {error}")
        client.sendall(b"after")
        client.shutdown(socket.SHUT_WR)
        assert receive_until_end(client) == b"before!after"

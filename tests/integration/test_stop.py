"""How the server stops, and what its clients get then."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import kecho
from support.clients import (
    DEADLINE_S,
    closed,
    connect,
    connected,
    echo,
    plenty,
    random_bytes,
    receive_exactly,
    receive_until_end,
    receive_until_reset,
    send_until_blocked,
    transfer,
    wait_for,
    wait_until_delivered,
)
from support.fixture_types import StartProcess, StartServer

pytestmark = pytest.mark.engines(sanitized=True, dispatch=True)


def stop_timed(server: kecho.Server, graceful_timeout: float) -> tuple[kecho.Stats, float]:
    """The final counters, and how long stop() took, in seconds."""
    began_s = time.monotonic()
    stats = server.stop(graceful_timeout=graceful_timeout)
    return stats, time.monotonic() - began_s


def listens(server: kecho.Server) -> bool:
    """Whether the kernel would still take connections: proc_net(5); 0A is LISTEN."""
    wanted = [f"0100007F:{server.port:04X}", "00000000:0000", "0A"]
    return any(
        line.split()[1:4] == wanted for line in Path("/proc/net/tcp").read_text().splitlines()
    )


def stays_true(condition: Callable[[], bool]) -> bool:
    """Whether it is true now and still is a moment later."""
    if not condition():
        return False
    time.sleep(0.1)
    return condition()


def hold_back(server: kecho.Server, client: socket.socket) -> int:
    """Sends, reading nothing, until the server has read all of it but cannot send all of it."""
    sent = 0
    while not stays_true(lambda sent=sent: server.stats().bytes_sent < sent):
        sent += client.send(plenty()[sent : sent + 16_384])
        wait_for(lambda sent=sent: server.stats().bytes_received == sent, "all of it is read")
    return sent


def stop_meanwhile(
    pool: ThreadPoolExecutor, server: kecho.Server, graceful_timeout: float
) -> Future[kecho.Stats]:
    """Has a thread wait in stop(); returns when the server drains."""
    assert listens(server)
    stopping = pool.submit(server.stop, graceful_timeout)
    wait_for(lambda: not listens(server), "the server is stopping")
    assert not stopping.done()
    return stopping


def test_stop_closes_idle_connections_at_once(server: kecho.Server) -> None:
    with connected(server, 20) as clients:
        for client in clients[:10]:
            assert echo(client, b"hello") == b"hello"
        stats, took_s = stop_timed(server, DEADLINE_S)
        assert took_s < DEADLINE_S / 2
        assert [client.recv(1) for client in clients] == [b""] * 20
    assert stats.closed == closed(drained=20)
    assert stats.active == 0


def test_stop_without_grace_ends_idle_connections_with_end_of_file(server: kecho.Server) -> None:
    with connected(server, 20) as clients:
        assert [echo(client, b"hello") for client in clients] == [b"hello"] * 20
        assert server.stop(graceful_timeout=0).closed == closed(drained=20)
        assert [client.recv(1) for client in clients] == [b""] * 20


def test_stop_echoes_what_was_received_before(server: kecho.Server) -> None:
    payloads = [random_bytes(100 + 700 * number, seed=number) for number in range(40)]
    with connected(server, len(payloads)) as clients:
        for client, payload in zip(clients, payloads, strict=True):
            client.sendall(payload)
        wait_until_delivered(*clients)
        stats = server.stop(graceful_timeout=DEADLINE_S)
        assert [receive_until_end(client) for client in clients] == payloads
    assert stats.closed == closed(drained=len(payloads))
    assert stats.bytes_received == stats.bytes_sent == sum(map(len, payloads))


def test_stop_echoes_what_a_client_that_reads_late_has_sent(server: kecho.Server) -> None:
    with ThreadPoolExecutor(1) as pool, connect(server) as client:
        # The server has stopped reading, and the last of it is in its socket.
        sent = 0
        while not stays_true(lambda sent=sent: server.stats().bytes_received < sent):
            sent += client.send(plenty()[sent : sent + 50_000])
            wait_until_delivered(client)
        stopping = stop_meanwhile(pool, server, DEADLINE_S)
        received = receive_until_end(client)
        stats = stopping.result(DEADLINE_S)
    assert len(received) == sent
    assert received == plenty()[:sent]
    assert stats.closed == closed(drained=1)


@pytest.mark.e2e
def test_stop_serves_those_who_wait_to_be_accepted(
    start_process: StartProcess, dispatch: str
) -> None:
    # So many that the stop comes while most of them wait.
    count = 400
    process = start_process("--dispatch", dispatch, "--threads", "2", "--backlog", str(2 * count))
    with process.paused():
        clients = [connect(process.port) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        wait_until_delivered(*clients)
    status = process.stop()
    for number, client in enumerate(clients):
        with client:
            assert receive_until_end(client) == b"%d" % number
    assert status == 0
    assert f"{count} connections accepted" in process.stderr


def test_stop_right_after_a_burst_serves_everyone_who_was_connected(
    start_server: StartServer, dispatch: str
) -> None:
    for _ in range(5):
        server = start_server(dispatch=dispatch, backlog=500)
        with connected(server, 100) as clients:
            for client in clients:
                client.sendall(b"hello")
            wait_until_delivered(*clients)
            stats = server.stop(graceful_timeout=DEADLINE_S)
            assert [receive_until_end(client) for client in clients] == [b"hello"] * 100
        assert stats.accepted == 100


def test_stop_resets_a_client_that_never_reads_at_the_deadline(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as silent, connect(server) as idle:
        sent = send_until_blocked(silent, plenty())
        stats, took_s = stop_timed(server, 0.5)
        assert 0.45 < took_s < 1.5
        assert idle.recv(1) == b""
        received = receive_until_reset(silent)
        assert len(received) < sent
        assert received == plenty()[: len(received)]
    assert stats.closed == closed(aborted=1, drained=1)
    assert stats.active == 0


def test_a_stream_that_is_cut_off_does_not_end_like_a_finished_one(server: kecho.Server) -> None:
    # With nothing unread in the server's socket it is not the kernel that makes it a reset.
    with connect(server, receive_buffer=4096) as silent:
        sent = hold_back(server, silent)
        assert server.stop(graceful_timeout=0.1).closed == closed(aborted=1)
        received = receive_until_reset(silent)
        assert len(received) < sent
        assert received == plenty()[: len(received)]


def test_an_idle_stream_that_is_cut_off_does_not_end_like_a_finished_one(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, idle_timeout=2)
    with connect(server, receive_buffer=4096) as silent:
        sent = hold_back(server, silent)
        wait_for(lambda: server.stats().closed["idle"] == 1, "it is closed")
        received = receive_until_reset(silent)
        assert len(received) < sent
        assert received == plenty()[: len(received)]


def test_stop_without_grace_resets_a_client_that_never_reads(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as silent:
        send_until_blocked(silent, plenty())
        stats, took_s = stop_timed(server, 0)
        assert took_s < 1
        receive_until_reset(silent)
    assert stats.closed == closed(aborted=1)


def test_the_graceful_timeout_of_the_options_is_the_default(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, graceful_timeout=0.3)
    with connect(server, receive_buffer=4096) as silent:
        send_until_blocked(silent, plenty())
        began_s = time.monotonic()
        assert server.stop().closed == closed(aborted=1)
        assert 0.25 < time.monotonic() - began_s < 1.3


def test_stop_ends_a_client_that_never_stops_sending(server: kecho.Server) -> None:
    ended = threading.Event()

    def send() -> None:
        try:
            while True:
                client.sendall(plenty()[: 1 << 20])
        except (ConnectionResetError, BrokenPipeError):
            ended.set()

    def read() -> None:
        try:
            while client.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass

    with connect(server) as client, ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(send), pool.submit(read)]
        wait_for(lambda: server.stats().bytes_sent > 1 << 20, "the stream flows")
        stats, took_s = stop_timed(server, 0.5)
        assert took_s < 1.5
        assert ended.wait(DEADLINE_S)
        for task in tasks:
            task.result(DEADLINE_S)
    assert stats.closed.total == stats.accepted == 1
    assert stats.closed["aborted"] + stats.closed["drained"] + stats.closed["reset"] == 1


def test_stop_amid_ping_pong_ends_everyone_and_garbles_nothing(server: kecho.Server) -> None:
    def play(number: int) -> int:
        rounds = 0
        with connect(server) as client:
            while True:
                message = b"%d:%d;" % (number, rounds) * 20
                try:
                    client.sendall(message)
                    answer = receive_exactly(client, len(message))
                except (ConnectionResetError, BrokenPipeError):
                    return rounds
                if answer != message:
                    # What the server never read is not echoed, and then nothing of it is.
                    assert answer == b""
                    return rounds
                rounds += 1

    with ThreadPoolExecutor(50) as pool:
        players = [pool.submit(play, number) for number in range(50)]
        wait_for(lambda: server.stats().accepted == 50, "all of them play")
        wait_for(lambda: server.stats().echoes > 1000, "they have played")
        stats, took_s = stop_timed(server, DEADLINE_S)
        assert took_s < DEADLINE_S / 2
        rounds = [player.result(DEADLINE_S) for player in players]
    assert sum(rounds) <= stats.echoes
    assert stats.closed["drained"] > 0
    assert stats.closed["aborted"] == stats.errors.total == 0
    assert stats.closed.total == stats.accepted == 50


def test_abort_resets_everyone(server: kecho.Server) -> None:
    with connected(server, 10) as clients:
        assert [echo(client, b"hello") for client in clients] == [b"hello"] * 10
        server.abort()
        assert server.wait(DEADLINE_S)
        assert [receive_until_reset(client) for client in clients] == [b""] * 10
    assert server.stats().closed == closed(aborted=10)
    assert not server.is_running


def test_abort_ends_a_stop_that_waits(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as silent, ThreadPoolExecutor(1) as pool:
        send_until_blocked(silent, plenty())
        stopping = stop_meanwhile(pool, server, 600)
        server.abort()
        assert stopping.result(DEADLINE_S).closed == closed(aborted=1)


def test_a_second_stop_brings_the_deadline_forward(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as silent, ThreadPoolExecutor(1) as pool:
        send_until_blocked(silent, plenty())
        stopping = stop_meanwhile(pool, server, 600)
        stats, took_s = stop_timed(server, 0.2)
        assert took_s < 1.2
        assert stopping.result(DEADLINE_S) == stats
        assert stats.closed == closed(aborted=1)


def test_a_second_stop_does_not_put_the_deadline_off(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as silent, ThreadPoolExecutor(1) as pool:
        send_until_blocked(silent, plenty())
        stopping = stop_meanwhile(pool, server, 1.5)
        _, took_s = stop_timed(server, 600)
        assert took_s < 3
        stopping.result(DEADLINE_S)


def test_request_stop_does_not_wait(server: kecho.Server) -> None:
    with connect(server, receive_buffer=4096) as silent:
        sent = send_until_blocked(silent, plenty())
        server.request_stop()
        assert not server.wait(0.05)
        assert server.is_running
        assert receive_exactly(silent, sent) == plenty()[:sent]
        assert server.wait(DEADLINE_S)
    assert server.stats().closed == closed(drained=1)


@pytest.mark.slow_under_sanitizers  # it has a fifth of a second
def test_what_a_shut_window_held_back_is_served_in_a_drain(server: kecho.Server) -> None:
    with connect(server) as silent:
        sent = send_until_blocked(silent, plenty())
        receive_exactly(silent, sent - 100_000)
        server.request_stop()
        # Once it can it sends again, as its kernel would on a line that is longer than this one.
        receive_exactly(silent, 100_000)
        silent.sendall(b"held back")
        assert receive_exactly(silent, 9) == b"held back"
        assert silent.recv(1) == b""
    assert server.wait(DEADLINE_S)
    assert server.stats().closed == closed(drained=1)


def test_a_client_that_once_did_not_read_and_goes_on_is_closed_in_a_drain(
    server: kecho.Server,
) -> None:
    with connect(server) as client:
        receive_exactly(client, send_until_blocked(client, plenty()))
        server.request_stop()
        with contextlib.suppress(ConnectionError):
            while True:
                client.sendall(b"ping")
                if not client.recv(4):
                    break
    assert server.wait(DEADLINE_S)
    assert server.stats().closed == closed(drained=1)


def test_a_stopped_server_refuses_connections(server: kecho.Server) -> None:
    with connect(server) as client:
        assert echo(client, b"hello") == b"hello"
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_stopping_twice_returns_the_same_counters(server: kecho.Server) -> None:
    with connect(server) as client:
        assert transfer(client, b"hello") == b"hello"
    first = server.stop()
    assert server.stop() == first == server.stats()


def test_several_threads_may_stop_it(server: kecho.Server) -> None:
    barrier = threading.Barrier(8)

    def stop() -> kecho.Stats:
        barrier.wait(DEADLINE_S)
        return server.stop()

    with connected(server, 5) as clients, ThreadPoolExecutor(8) as pool:
        assert [echo(client, b"hello") for client in clients] == [b"hello"] * 5
        stops = [pool.submit(stop) for _ in range(8)]
        results = [one.result(DEADLINE_S) for one in stops]
    assert results == results[:1] * 8
    assert results[0].closed == closed(drained=5)


def test_it_can_be_started_and_stopped_again_and_again(server: kecho.Server) -> None:
    for number in range(10):
        with connected(server, 3) as clients:
            assert [echo(client, b"hello") for client in clients] == [b"hello"] * 3
            assert server.stop().closed == closed(drained=3)
        assert not server.is_running
        if number < 9:
            server.start()
            assert server.stats().accepted == 0


def test_two_servers_do_not_disturb_each_other(start_server: StartServer, dispatch: str) -> None:
    first, second = start_server(dispatch=dispatch), start_server(dispatch=dispatch)
    assert first.port != second.port
    with connected(first, 3) as of_first, connected(second, 2) as of_second:
        assert [echo(one, b"first") for one in of_first] == [b"first"] * 3
        assert [echo(one, b"second") for one in of_second] == [b"second"] * 2
        assert first.stop().closed == closed(drained=3)
        assert [one.recv(1) for one in of_first] == [b""] * 3
        assert [echo(one, b"still here") for one in of_second] == [b"still here"] * 2
    stats = second.stop()
    assert stats.accepted == 2
    assert stats.bytes_sent == 2 * len(b"second" + b"still here")


def test_a_unix_socket_drains_the_same_way(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    server = start_server(uds=str(path), dispatch=dispatch)
    with connected(server, 10) as clients, connect(server) as silent:
        for client in clients[:5]:
            client.sendall(b"hello")
        send_until_blocked(silent, plenty())
        stats, took_s = stop_timed(server, 0.4)
        assert 0.35 < took_s < 1.4
        received = [receive_until_end(client) for client in clients]
        assert received == [b"hello"] * 5 + [b""] * 5
    assert stats.closed == closed(drained=10, aborted=1)
    assert not path.exists()

"""How clients end connections, and what the counters say of it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

import kecho
from support.clients import (
    closed,
    connect,
    connected,
    echo,
    plenty,
    random_bytes,
    reset,
    send_until_blocked,
    transfer,
    transfer_all,
    wait_for,
)

pytestmark = pytest.mark.engines(sanitized=True)


# ---- the client ends it ---------------------------------------------------------------------


def test_a_reset_ends_that_connection_alone(server: kecho.Server) -> None:
    with connected(server, 3) as others:
        client = connect(server)
        assert echo(client, b"hello") == b"hello"
        reset(client)
        wait_for(lambda: server.stats().active == 3, "that connection is gone")
        assert server.stats().closed == closed(reset=1)
        assert [echo(one, b"still here") for one in others] == [b"still here"] * 3
    wait_for(lambda: server.stats().active == 0, "the others have ended")
    assert server.stop().closed == closed(reset=1, eof=3)


def test_a_reset_at_once_is_counted(server: kecho.Server) -> None:
    for _ in range(50):
        reset(connect(server))
    wait_for(lambda: server.stats().closed.total == 50, "all of them have ended")
    with connect(server) as client:
        assert transfer(client, b"next") == b"next"
    stats = server.stop()
    assert stats.accepted == 51
    assert stats.closed == closed(reset=50, eof=1)
    assert stats.errors.total == 0


def test_a_reset_with_the_echo_unread_is_counted(server: kecho.Server) -> None:
    client = connect(server)
    client.sendall(random_bytes(10_000))
    wait_for(lambda: server.stats().bytes_sent == 10_000, "the echo is on its way")
    client.close()  # with data unread this is a reset: tcp(7)
    wait_for(lambda: server.stats().closed == closed(reset=1), "the reset is counted")


def test_a_reset_after_a_half_close_is_an_end(server: kecho.Server) -> None:
    for _ in range(20):
        client = connect(server)
        client.sendall(random_bytes(100_000))
        client.shutdown(socket.SHUT_WR)
        reset(client)
    wait_for(lambda: server.stats().accepted == 20, "all of them were accepted")
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    stats = server.stop()
    assert stats.closed["eof"] + stats.closed["reset"] == 20
    assert stats.errors.total == 0


# ---- the counters ---------------------------------------------------------------------------


def test_the_counters_of_a_clean_run_add_up(server: kecho.Server) -> None:
    payloads = [random_bytes(30_000, seed=number) for number in range(24)]
    with connected(server, len(payloads)) as clients:
        assert transfer_all(clients, payloads) == payloads
    stats = server.stop()
    assert stats.accepted == 24
    assert stats.active == 0
    assert stats.closed == closed(eof=24)
    assert stats.bytes_received == stats.bytes_sent == 24 * 30_000
    assert stats.echoes >= 24
    assert stats.errors.total == 0
    assert stats.seconds > 0
    for name in ("accepted", "active", "bytes_received", "bytes_sent", "echoes", "backpressure"):
        assert sum(getattr(one, name) for one in stats.workers) == getattr(stats, name)
    assert sum(one.closed["eof"] for one in stats.workers) == 24
    assert len(stats.workers) == server.threads == 2


def test_the_counters_of_a_rough_run_add_up(server: kecho.Server) -> None:
    ended, idle, half_closed = (connect(server) for _ in range(3))
    with ended, idle, half_closed, connect(server, receive_buffer=4096) as silent:
        assert transfer(half_closed, b"12345") == b"12345"
        assert echo(ended, b"123") == b"123"
        reset(ended)
        send_until_blocked(silent, plenty())
        wait_for(lambda: server.stats().active == 2, "two have ended")
        running = server.stats()
        assert running.accepted == running.active + running.closed.total == 4
        stats = server.stop(graceful_timeout=0)
    assert stats.closed == closed(reset=1, eof=1, drained=1, aborted=1)
    assert stats.accepted == stats.closed.total
    assert stats.bytes_received > stats.bytes_sent > 8


def test_counters_of_an_interval_are_a_difference(server: kecho.Server) -> None:
    with connect(server) as first:
        assert echo(first, bytes(1000)) == bytes(1000)
        wait_for(lambda: server.stats().echoes == 1, "the echo is counted")
        before = server.stats()
        with connect(server) as second:
            assert echo(second, bytes(10)) == bytes(10)
            assert echo(second, bytes(20)) == bytes(20)
            # A client may have the echo before it is counted.
            wait_for(lambda: (server.stats() - before).echoes == 2, "the echoes are counted")
            during = server.stats() - before
            assert (during.accepted, during.active) == (1, 2)
            assert (during.bytes_received, during.bytes_sent, during.echoes) == (30, 30, 2)
            assert during.closed.total == 0
        wait_for(lambda: server.stats().active == 1, "the second one has ended")
        assert (server.stats() - before).closed == closed(eof=1)
        assert 0 < (server.stats() - before).seconds <= server.stats().seconds


def test_counters_only_grow_while_it_runs(server: kecho.Server) -> None:
    names = ("accepted", "bytes_received", "bytes_sent", "echoes")
    payloads = [random_bytes(500_000, seed=number) for number in range(8)]
    with connected(server, len(payloads)) as clients, ThreadPoolExecutor(1) as pool:
        transfers = pool.submit(transfer_all, clients, payloads)
        earlier = server.stats()
        while not transfers.done():
            now = server.stats()
            assert all(getattr(now, name) >= getattr(earlier, name) for name in names)
            earlier = now
        assert transfers.result() == payloads
    assert server.stop().bytes_sent == 8 * 500_000

"""Whose turn it is when clients have more to read than a turn takes: seen by strace(1), in sockets
that hold all of it before the server looks."""

from __future__ import annotations

import re
import socket
from collections import Counter
from itertools import groupby

import pytest

from clients import DEADLINE_S, echo, random_bytes, receive_exactly, wait_until_delivered
from traced import EPOLL_WAIT, StartTraced, TracedServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

CHUNK = 1 << 16
READS_PER_TURN = 4
TURNS_IN_A_ROW = 16
STREAMS_KEPT = 8
ROOM = 32 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # beyond net.core.wmem_max and rmem_max: socket(7)


def make_room(one: socket.socket) -> None:
    try:
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            one.setsockopt(socket.SOL_SOCKET, option, ROOM)
    except PermissionError:
        pytest.skip("needs CAP_NET_ADMIN")


def echoed_at_once(
    start_traced: StartTraced, tcp: socket.socket, count: int, chunks: int
) -> TracedServer:
    """A server, stopped again, that has found `count` sockets with so many chunks in each."""
    payload = random_bytes(chunks * CHUNK)
    make_room(tcp)  # which accepted sockets inherit
    arguments = ("--fd", str(tcp.fileno()))
    server = start_traced(f"recvfrom,{EPOLL_WAIT}", None, *arguments, pass_fds=[tcp.fileno()])
    clients = [socket.socket() for _ in range(count)]
    try:
        for client in clients:
            client.settimeout(DEADLINE_S)
            make_room(client)
            client.connect(tcp.getsockname())
            assert echo(client, b"hello") == b"hello"
        with server.process.paused():
            for client in clients:
                client.sendall(payload)
            wait_until_delivered(*clients)
        for client in clients:
            assert receive_exactly(client, len(payload)) == payload
    finally:
        for client in clients:
            client.close()
    assert server.process.stop() == 0
    return server


def looks(server: TracedServer) -> list[tuple[int, list[str]]]:
    """How many events each look found, and by which descriptors whole chunks were read then."""
    found: list[tuple[int, list[str]]] = []
    for _, name, rest in server.calls():
        result = re.search(r" = (-?\d+)", rest)
        if name.startswith("epoll"):
            found.append((max(0, int(result[1])) if result else 0, []))
        elif result and int(result[1]) == CHUNK:
            found[-1][1].append(rest.partition(",")[0])
    return found


def test_a_stream_has_many_turns_in_a_row_and_whoever_asks_and_waits_is_looked_for_between_them(
    start_traced: StartTraced, tcp: socket.socket
) -> None:
    found = looks(echoed_at_once(start_traced, tcp, count=3, chunks=128))
    for events, reads in found:
        assert len(reads) <= (events + 1) * READS_PER_TURN
    runs = [
        (descriptor, len(list(run)))
        for descriptor, run in groupby(one for _, reads in found for one in reads)
    ]
    first, second, third = (descriptor for descriptor, _ in runs[:3])
    assert runs[:6] == [
        (first, READS_PER_TURN),
        (second, READS_PER_TURN),
        (third, READS_PER_TURN),
        (first, READS_PER_TURN * TURNS_IN_A_ROW),
        (second, READS_PER_TURN),
        (first, READS_PER_TURN),  # given back to the kernel, which has reported it again
    ]
    assert runs[6] == (second, READS_PER_TURN * (TURNS_IN_A_ROW - 1))


def test_more_streams_than_a_worker_keeps_get_on_alike(
    start_traced: StartTraced, tcp: socket.socket
) -> None:
    count, chunks = STREAMS_KEPT + 4, 48
    found = looks(echoed_at_once(start_traced, tcp, count=count, chunks=chunks))
    had: Counter[str] = Counter()
    for _, reads in found:
        had.update(reads)
        if max(had.values(), default=0) == chunks:
            break
        if len(had) == count:
            assert max(had.values()) - min(had.values()) <= 2 * READS_PER_TURN
    assert sum(had.values()) > count * chunks / 2

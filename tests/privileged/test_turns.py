"""Whose turn it is when clients have more to read than a turn takes: seen by strace(1), in sockets
that hold all of it before the server looks."""

from __future__ import annotations

import math
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby

import pytest

from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    random_bytes,
    receive_exactly,
    receive_until_end,
    wait_until_delivered,
)
from support.server_process import ServerProcess
from support.traced_server import EPOLL_WAIT, StartTraced, TracedServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

CHUNK = 1 << 16
TURN = 4  # chunks
TURNS_IN_A_CIRCLE = 64
STREAMS_KEPT = 8
PAYLOAD = random_bytes(128 * CHUNK)
ROOM = 32 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # beyond net.core.wmem_max and rmem_max: socket(7)


def make_room(one: socket.socket) -> None:
    try:
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            one.setsockopt(socket.SOL_SOCKET, option, ROOM)
    except PermissionError:
        pytest.skip("needs CAP_NET_ADMIN")


@contextmanager
def clients_of(listener: socket.socket, chunks: Sequence[int]) -> Iterator[list[socket.socket]]:
    """Clients whose sockets have room for so many chunks, and more."""
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in chunks]
        for client in clients:
            client.settimeout(DEADLINE_S)
            make_room(client)
            client.connect(listener.getsockname())
            assert echo(client, b"hello") == b"hello"
        yield clients


def send(clients: Sequence[socket.socket], chunks: Sequence[int]) -> None:
    """Until it is all in the server's sockets."""
    for client, count in zip(clients, chunks, strict=True):
        client.sendall(PAYLOAD[: count * CHUNK])
    wait_until_delivered(*clients)


def echoed_at_once(
    start_traced: StartTraced, tcp: socket.socket, chunks: Sequence[int]
) -> TracedServer:
    """A server, stopped again, that has found sockets with so many chunks in them."""
    make_room(tcp)  # which accepted sockets inherit
    arguments = ("--fd", str(tcp.fileno()))
    server = start_traced(f"recvfrom,{EPOLL_WAIT}", None, *arguments, pass_fds=[tcp.fileno()])
    with clients_of(tcp, chunks) as clients:
        with server.process.paused():
            send(clients, chunks)
        for client, count in zip(clients, chunks, strict=True):
            assert receive_exactly(client, count * CHUNK) == PAYLOAD[: count * CHUNK]
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
    found = looks(echoed_at_once(start_traced, tcp, [128] * 3))
    for events, reads in found:
        assert len(reads) <= (events + 1) * TURN
    runs = [
        (descriptor, len(list(run)))
        for descriptor, run in groupby(one for _, reads in found for one in reads)
    ]
    first, second, third = (descriptor for descriptor, _ in runs[:3])
    in_a_row = math.ceil(TURNS_IN_A_CIRCLE / 3)
    assert runs[:6] == [
        (first, TURN),
        (second, TURN),
        (third, TURN),
        (first, in_a_row * TURN),
        (second, TURN),
        (first, TURN),  # given back to the kernel, which has reported it again
    ]
    assert runs[6] == (second, (in_a_row - 1) * TURN)


@pytest.mark.parametrize(("count", "chunks"), [(STREAMS_KEPT + 4, 128), (100, 32)])
def test_more_streams_than_a_worker_keeps_get_on_alike(
    start_traced: StartTraced, tcp: socket.socket, count: int, chunks: int
) -> None:
    found = looks(echoed_at_once(start_traced, tcp, [chunks] * count))
    had: Counter[str] = Counter()
    for _, reads in found:
        had.update(reads)
        if max(had.values(), default=0) == chunks:
            break
        if len(had) == count:
            # On a busy machine a turn may be cut: what the kernel had no room for goes first.
            assert max(had.values()) - min(had.values()) <= 2 * TURN
    assert sum(had.values()) > count * chunks / 2


def test_who_asks_for_much_does_not_have_more_than_the_streams(
    start_traced: StartTraced, tcp: socket.socket
) -> None:
    asked = TURN - 1
    found = looks(echoed_at_once(start_traced, tcp, [128] * STREAMS_KEPT + [asked] * 16))
    events, reads = next(one for one in found if one[1])
    assert events == STREAMS_KEPT + 16
    # As many turns as they have had in all, but no more than one for each stream.
    assert len(reads) == STREAMS_KEPT * TURN + 16 * asked + STREAMS_KEPT * TURN


def test_at_a_stop_whoever_found_no_place_is_closed_when_all_of_it_is_echoed(
    tcp: socket.socket, dispatch: str
) -> None:
    make_room(tcp)
    chunks = [2 * TURN] * 3 * STREAMS_KEPT  # the second turn empties the socket, and nobody knows
    arguments = ("--fd", str(tcp.fileno()), "--dispatch", dispatch, "--threads=1")
    with (
        ServerProcess(arguments, pass_fds=[tcp.fileno()]) as server,
        clients_of(tcp, chunks) as clients,
    ):
        server.wait_until_listening()
        with server.paused():
            send(clients, chunks)
            server.send(signal.SIGTERM)
        for client in clients:
            assert receive_until_end(client) == PAYLOAD[: 2 * TURN * CHUNK]
        assert server.wait() == 0


def test_a_burst_is_taken_out_of_the_accept_queue_before_anybody_is_served(
    start_traced: StartTraced,
) -> None:
    server = start_traced("accept4,recvfrom", None, "--backlog", "128")
    with ExitStack() as stack:
        with server.process.paused():
            clients = [stack.enter_context(connect(server.port)) for _ in range(100)]
            for client in clients:
                client.sendall(b"hello")
            wait_until_delivered(*clients)
        for client in clients:
            assert receive_exactly(client, 5) == b"hello"
    assert server.process.stop() == 0
    names = [name for _, name, rest in server.calls() if " = -1 " not in rest]
    assert names.index("recvfrom") == names.count("accept4") == len(clients)

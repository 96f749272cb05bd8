"""--engine sockmap and memory: what clients cost that do not read, and who is reset for it.

A client that never reads can send until the kernel and the server hold as much as they may. So the
bytes that such clients sent are what is held for them. A client that was reset no longer counts.
"""

from __future__ import annotations

import contextlib
import operator
import os
import resource
import selectors
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from support.clients import (
    connect,
    connected,
    echo,
    random_bytes,
    reset,
    send_until_blocked,
    transfer_all,
    wait_for,
)
from support.engines import HANDED_OVER_BYTES, needs_sockmap
from support.fixture_types import StartServer

MIB = 1 << 20
BOUND_BYTES = 4 * MIB  # beyond socket buffers, for one connection
MOST_BYTES = 256 * MIB  # --max-buffer-memory
SKB_BYTES = 1 << 10  # what an skb costs beside its data
PIECE = bytes(1 << 16)
SEND_BUFFER_BYTES = 512 << 10  # with a small one the client waits for delayed acknowledgements


@pytest.fixture
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def push(clients: list[socket.socket], taken: dict[socket.socket, int], seconds: float) -> None:
    """Sends for so long, and adds to `taken` what the kernel took from each client. A client that
    the server has reset is removed from it."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in selector.select(0.1):
                client: socket.socket = key.fileobj  # type: ignore[assignment]
                try:
                    taken[client] += client.send(PIECE)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    selector.unregister(client)
                    del taken[client]


def cost(port: int, count: int) -> int:
    """The bytes that clients could send before all of them were blocked, without those of clients
    that the server has reset."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(connect(port, receive_buffer=4096, send_buffer=SEND_BUFFER_BYTES))
            stack.callback(reset, clients[-1])
        taken = dict.fromkeys(clients, 0)
        held = -1
        for _ in range(20):
            before, held = held, sum(taken.values())
            if 0 < held < before + MIB:
                return held
            push(list(taken), taken, 0.7)
    pytest.fail(f"it grows on: {held // MIB} MiB")


@pytest.mark.slow_under_sanitizers
@pytest.mark.usefixtures("_descriptors")
@needs_sockmap
@pytest.mark.parametrize(
    "count", [10, pytest.param(1000, marks=[pytest.mark.release, pytest.mark.alone])]
)
def test_clients_that_never_read_cost_no_more_than_the_bound_beyond_what_epoll_costs(
    start_server: StartServer, count: int
) -> None:
    """The server's buffers are of a fixed size: those that grow differ by megabytes."""
    costs = {}
    for engine in ("epoll", "sockmap"):
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listener.setsockopt(socket.SOL_SOCKET, option, 1 << 16)
            server = start_server(
                engine=engine, fd=(listener.fileno(),), max_buffer_memory=MOST_BYTES
            )
            costs[engine] = cost(server.port, count)
    more = costs["sockmap"] - costs["epoll"]
    assert more < min(count * BOUND_BYTES, MOST_BYTES), costs


@needs_sockmap
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_memory_for_a_client_that_never_reads_is_bounded(
    start_server: StartServer, size: int
) -> None:
    """Small buffers at the client; what is between is the server's. In single bytes, too, whose
    skbs cost a thousand times as much."""
    server = start_server(engine="sockmap", graceful_timeout=0)
    with connect(server, receive_buffer=4096, send_buffer=65536) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for payload in [random_bytes(64 << 20)] if size > 1 else [b"x"] * 10:
            flood(client, payload)
            given_to_tcp = bytes_given_to_tcp(client.getsockname())
            queued = server.stats().bytes_sent - given_to_tcp  # by the program, charged to nobody
            assert queued * (1 if size > 1 else SKB_BYTES) < BOUND_BYTES, queued


def bytes_given_to_tcp(client: tuple[str, int]) -> int:
    """What the socket of the server, which is in this process, has sent or holds to be sent:
    TCP_INFO's bytes_sent less bytes_retrans, and notsent_bytes."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.getpeername() != client:
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                (notsent,) = struct.unpack_from("I", info, 144)
                sent, sent_again = struct.unpack_from("QQ", info, 200)
                return int(sent - sent_again + notsent)
    raise AssertionError(f"no socket here is connected to {client}")


def flood(client: socket.socket, payload: bytes) -> None:
    """Sends until there is no room any more; a single byte again and again, for 0.2 s."""
    if len(payload) > 1:
        send_until_blocked(client, payload)
        return
    client.settimeout(0.2)
    end_s = time.monotonic() + 0.2
    with contextlib.suppress(TimeoutError):
        while time.monotonic() < end_s:
            client.send(payload)


@needs_sockmap
def test_max_buffer_memory_holds_for_many_clients_that_never_read(
    start_server: StartServer,
) -> None:
    server = start_server(engine="sockmap", max_buffer_memory=1 << 16, graceful_timeout=0)
    count, payload = 40, random_bytes(1 << 20)
    with connected(server, count, receive_buffer=4096) as clients:
        for client in clients:
            client.setblocking(False)

        def send_on() -> bool:
            for client in clients:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    client.send(payload)
            return server.stats().closed["evicted"] >= 2

        wait_for(send_on, "those who are too many are reset")


@needs_sockmap
@pytest.mark.slow_under_sanitizers  # the clients have to read as fast as the kernel echoes
def test_clients_that_read_are_not_reset_for_what_is_on_its_way_to_them(
    start_server: StartServer,
) -> None:
    """At once they are given more than may wait, by a little. The server cannot tell a client that
    a busy machine kept from reading for 100 ms from one that does not read."""
    server = start_server(engine="sockmap", threads=1, max_buffer_memory=256 << 10)
    data = random_bytes(3_000_000)
    rounds, resets = 0, 0
    turns: list[float] = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        rounds += 1
        turns[:] = [time.monotonic()]
        try:
            with connected(server, 3, send_buffer=1 << 20) as clients:
                received = transfer_all(clients, [data] * 3, lambda: turns.append(time.monotonic()))
            assert received == [data] * 3
        except ConnectionResetError:
            turns.append(time.monotonic())
            resets += max(map(operator.sub, turns[1:], turns)) < 0.05
    assert resets <= rounds // 10


@needs_sockmap
def test_those_who_remain_when_a_crowd_has_left_may_have_the_kernel_hold_more_again(
    start_server: StartServer, dispatch: str
) -> None:
    """A segment of more than the least that each may have shows it: it is passed, or echoed."""
    server = start_server(engine="sockmap", dispatch=dispatch, threads=4, max_buffer_memory=2 << 20)
    payload = random_bytes(HANDED_OVER_BYTES)
    with connect(server) as remaining:
        assert echo(remaining, b"x") == b"x"
        with connected(server, 40) as crowd:
            assert [echo(client, b"x") for client in crowd] == [b"x"] * 40
            assert echo(crowd[0], payload) == payload
            assert server.stats().backpressure == 1
        wait_for(lambda: server.stats().active == 1, "the crowd has left")
        assert echo(remaining, payload) == payload
        assert server.stats().backpressure == 1

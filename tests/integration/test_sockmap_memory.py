"""--engine sockmap and memory: what clients cost that do not read, and who is reset for it.

MemAvailable is everybody's: on a busy machine it moves by tens of MiB a second. So what one
client costs is the least of several rounds, and a bound has to be broken in each of them.
"""

from __future__ import annotations

import contextlib
import re
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kecho
from clients import (
    connect,
    connected,
    echo,
    random_bytes,
    reset,
    send_until_blocked,
    transfer_all,
    wait_for,
)
from engines import HANDED_OVER_BYTES, needs_sockmap
from kecho.sandbox import IS_SANITIZED
from processes import ServerProcess

StartServer = Callable[..., kecho.Server]
StartProcess = Callable[..., ServerProcess]

MIB = 1 << 20
BOUND_BYTES = 4 * MIB  # beyond socket buffers, for one connection
MOST_BYTES = 256 * MIB  # --max-buffer-memory
NOISE_BYTES = 48 * MIB
PIECE = bytes(1 << 16)
SEND_BUFFER_BYTES = 512 << 10  # with a small one the client waits for delayed acknowledgements
ROUNDS = {1: 3, 1000: 2}


def available_bytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) << 10


@pytest.fixture
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def push(clients: list[socket.socket], seconds: float) -> None:
    """Sends whatever is taken; who is reset is left alone."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in selector.select(0.1):
                try:
                    key.fileobj.send(PIECE)  # type: ignore[union-attr]
                except BlockingIOError:
                    pass
                except ConnectionError:
                    selector.unregister(key.fileobj)


def cost(port: int, count: int) -> int:
    """By how much MemAvailable has fallen when it falls no more; and that it rises again."""
    clients: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        before = available_bytes()
        for _ in range(count):
            clients.append(connect(port, receive_buffer=4096, send_buffer=SEND_BUFFER_BYTES))
            stack.callback(reset, clients[-1])
        push(clients, 1)
        fell = before - available_bytes()
        for _ in range(10):
            before_this = fell
            push(clients, 1)
            fell = before - available_bytes()
            if fell - before_this < NOISE_BYTES // 2:
                break
        else:
            pytest.fail(f"it grows on: {fell // MIB} MiB")
    left = max(NOISE_BYTES, fell // 4)  # others take some meanwhile
    wait_for(lambda: before - available_bytes() < left, "the memory is given back")
    return fell


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers
@pytest.mark.usefixtures("_descriptors")
@needs_sockmap
@pytest.mark.parametrize("count", [1, 1000])
def test_clients_that_never_read_cost_no_more_than_the_bound_beyond_what_epoll_costs(
    start_process: StartProcess, count: int
) -> None:
    options = ["--backlog=4096", f"--max-buffer-memory={MOST_BYTES}"]
    servers = {name: start_process("--engine", name, *options) for name in ("epoll", "sockmap")}
    costs: dict[str, list[int]] = {name: [] for name in servers}
    for _ in range(ROUNDS[count]):
        for name, server in servers.items():
            costs[name].append(cost(server.port, count))
    more = min(costs["sockmap"]) - min(costs["epoll"])
    print({name: [one // MIB for one in each] for name, each in costs.items()})
    assert more < min(count * BOUND_BYTES, MOST_BYTES) + NOISE_BYTES, costs


@needs_sockmap
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_memory_for_a_client_that_never_reads_is_bounded(
    start_server: StartServer, size: int
) -> None:
    """Small buffers at the client; what is between is the server's. In single bytes, too, whose
    skbs cost a thousand times as much."""
    server = start_server(engine="sockmap", graceful_timeout=0)
    with connect(server, receive_buffer=4096) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        payload = random_bytes(64 << 20) if size > 1 else b""
        before = available_bytes()
        flood(client, payload)
        # 4 MiB of send buffer on each side, a receive buffer, and what others do meanwhile. Where
        # sanitizers run side by side, that is more.
        assert IS_SANITIZED or before - available_bytes() < BOUND_BYTES + NOISE_BYTES


def flood(client: socket.socket, payload: bytes) -> None:
    """Sends until there is no room any more; without a payload single bytes, for two seconds."""
    if payload:
        send_until_blocked(client, payload)
        return
    client.settimeout(0.2)
    end_s = time.monotonic() + 2
    while time.monotonic() < end_s:
        try:
            client.send(b"x")
        except TimeoutError:
            break


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
def test_clients_that_read_are_not_reset_for_what_is_on_its_way_to_them(
    start_server: StartServer,
) -> None:
    """At once they are given more than may wait, by a little."""
    server = start_server(engine="sockmap", threads=1, max_buffer_memory=256 << 10)
    data = random_bytes(3_000_000)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        with connected(server, 3, send_buffer=1 << 20) as clients:
            assert transfer_all(clients, [data] * 3) == [data] * 3
    assert server.stats().closed["evicted"] == 0


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

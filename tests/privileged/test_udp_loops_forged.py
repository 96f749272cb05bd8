"""UDP: one forged datagram, whose source is another echo server, begins a loop, which ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import pytest

import kecho
from support.namespaces import Namespace
from support.udp_clients import counted, send_forged
from support.udp_loops import datagrams_of, wait_for_the_end

pytestmark = pytest.mark.privileged

LOOPBACK = "127.0.0.1"
# An answer goes 64 hops, and each further one a hop less, once both servers have noticed.
ANSWERS_MOST = 64 + 4

StartServers = Callable[..., list[kecho.Server]]


@pytest.fixture
def start_servers(namespace: Namespace, start_server: Callable[..., kecho.Server]) -> StartServers:
    """start_servers(count, **options): in one namespace, on a port each."""

    def start(count: int, **options: object) -> list[kecho.Server]:
        with namespace:
            return [start_server(udp=True, **options) for _ in range(count)]

    return start


def begin_loops(
    namespace: Namespace, servers: Sequence[kecho.Server], datagrams: Sequence[bytes]
) -> None:
    """All of them, between each two of the servers."""
    with namespace:
        for (one, other), data in itertools.product(itertools.combinations(servers, 2), datagrams):
            send_forged((LOOPBACK, other.port), (LOOPBACK, one.port), data)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.release), 50, 1000])
def test_a_loop_of_two_servers_ends(
    namespace: Namespace, start_servers: StartServers, dispatch: str, count: int
) -> None:
    servers = start_servers(2, dispatch=dispatch)
    begin_loops(namespace, servers, datagrams_of(count, 1000))
    answered = wait_for_the_end(servers, count)
    assert answered <= ANSWERS_MOST * count
    if count <= 50:  # more do not find room in the receive queues, and may all end there
        assert sum(counted(one).refused["repeated"] for one in servers) > 0


@pytest.mark.parametrize("size", [0, 1, 9000, 60000])
def test_a_loop_of_two_servers_ends_at_any_size(
    namespace: Namespace, start_servers: StartServers, size: int
) -> None:
    servers = start_servers(2)
    begin_loops(namespace, servers, datagrams_of(3, size))
    assert wait_for_the_end(servers, 3) <= ANSWERS_MOST * 3


def test_a_loop_of_three_servers_ends(
    namespace: Namespace, start_servers: StartServers, dispatch: str
) -> None:
    servers = start_servers(3, dispatch=dispatch)
    begin_loops(namespace, servers, datagrams_of(50, 1000))
    assert wait_for_the_end(servers, 50 * 3) <= ANSWERS_MOST * 50 * 3


def test_a_loop_that_is_fed_ends_with_its_food(
    namespace: Namespace, start_servers: StartServers
) -> None:
    servers = start_servers(2)
    end = time.monotonic() + 0.5
    sent = 0
    with namespace:
        while time.monotonic() < end:
            for data in datagrams_of(100, 100):
                send_forged((LOOPBACK, servers[1].port), (LOOPBACK, servers[0].port), data)
            sent += 100
    assert wait_for_the_end(servers, sent) <= ANSWERS_MOST * sent

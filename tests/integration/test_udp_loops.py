"""UDP: a loop with another echo server ends by itself, and clients do not notice what ends it."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

import kecho
from kecho import bench
from kecho.bench import Workload
from support.clients import wait_for
from support.fixture_types import StartServer
from support.udp_clients import client, counted, receive_all, receive_waiting, send_segments
from support.udp_loops import datagrams_of, plain_echo, relay, wait_for_the_end

LOOPBACK = "127.0.0.1"
AT_ONCE = 128  # repeated datagrams that are answered whatever the rate
OWED_MOST = 64  # and those beyond them until one is refused
NO_RATES = {"udp_rate": 0, "udp_rate_total": 0}


def echoing(start_server: StartServer, **options: object) -> kecho.Server:
    """A server with UDP that no other rate limits."""
    return start_server(**{"udp": True, **NO_RATES, **options})


# ---- loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.release), 50, 1000])
def test_a_loop_with_an_echo_that_is_not_kecho_ends(
    start_server: StartServer, dispatch: str, count: int
) -> None:
    server = echoing(start_server, dispatch=dispatch)
    began = time.monotonic()
    with plain_echo() as other:
        for data in datagrams_of(count, 1000):
            other.sendto(data, (LOOPBACK, server.port))
        answered = wait_for_the_end([server], count, [other])
    lasted = time.monotonic() - began
    udp = counted(server)
    assert 1 <= udp.refused["repeated"] <= count
    # Each refusal ends one for good, and comes at the latest when so many are owed.
    assert answered <= count + AT_ONCE + count * OWED_MOST + 12 * lasted


@pytest.mark.parametrize("size", [0, 1, 9000, 60000])
def test_a_loop_of_datagrams_of_any_size_ends(start_server: StartServer, size: int) -> None:
    server = echoing(start_server)
    with plain_echo() as other:
        for data in datagrams_of(20, size):
            other.sendto(data, (LOOPBACK, server.port))
        wait_for_the_end([server], 20, [other])
    assert counted(server).refused["repeated"] > 0


@pytest.mark.parametrize("is_distinct", [False, True])
def test_a_loop_of_joined_datagrams_ends(
    start_server: StartServer, dispatch: str, is_distinct: bool
) -> None:
    server = echoing(start_server, dispatch=dispatch)
    data = b"".join(datagrams_of(60, 100)) if is_distinct else bytes(6000)
    with plain_echo(joined=True) as other:
        for _ in range(3):
            send_segments(other, data, 100, (LOOPBACK, server.port))
        wait_for_the_end([server], 3 * 60, [other])
    assert counted(server).refused["repeated"] > 0


def test_a_loop_over_ipv6_ends(start_server: StartServer, dispatch: str) -> None:
    server = echoing(start_server, dispatch=dispatch, host="::1")
    with plain_echo("::1") as other:
        for data in datagrams_of(50, 100):
            other.sendto(data, ("::1", server.port))
        wait_for_the_end([server], 50, [other])
    assert counted(server).refused["repeated"] > 0


@pytest.mark.parametrize(
    ("count", "host"),
    [
        (50, LOOPBACK),
        (50, "::1"),
        *(
            pytest.param(count, host, marks=pytest.mark.release)
            for count, host in itertools.product((1, 2, 1000), (LOOPBACK, "::1"))
        ),
    ],
)
def test_a_loop_of_two_servers_that_10_ms_part_ends(
    start_server: StartServer, count: int, host: str
) -> None:
    """The relay is no router: it sends anew, as a proxy does, and hops do not count."""
    servers = [echoing(start_server, host=host) for _ in range(2)]
    with relay(*((host, one.port) for one in servers), 0.01) as ends:
        for data in datagrams_of(count, 1000):
            ends[0].send(data)
        wait_for_the_end(servers, count, ends)
    assert sum(counted(one).refused["repeated"] for one in servers) > 0


def test_without_a_limit_of_repeats_a_loop_goes_on(start_server: StartServer) -> None:
    server = echoing(start_server, udp_rate_repeated=0)
    with plain_echo() as other:
        other.sendto(b"round", (LOOPBACK, server.port))
        wait_for(lambda: (udp := server.stats().udp) and udp.sent > 2000, "it goes on")
    assert counted(server).refused.total == 0


# ---- how far an answer goes -------------------------------------------------------------------

HOPS = {
    socket.AF_INET: (LOOPBACK, socket.IPPROTO_IP, socket.IP_TTL, 12),  # IP_RECVTTL
    socket.AF_INET6: (
        *("::1", socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
        socket.IPV6_RECVHOPLIMIT,
    ),
}


@pytest.mark.parametrize("family", HOPS)
def test_the_answer_to_a_repeated_datagram_goes_one_hop_less_far(
    start_server: StartServer, dispatch: str, family: socket.AddressFamily
) -> None:
    host, level, hops, tell_hops = HOPS[family]
    server = echoing(start_server, host=host, dispatch=dispatch)
    with client(family) as one:
        one.connect((host, server.port))
        one.setsockopt(level, tell_hops, 1)

        def answered(data: bytes, could_go: int) -> int:
            one.setsockopt(level, hops, could_go)
            one.send(data)
            reply, control, _, _ = one.recvmsg(100, 64)
            assert reply == data
            return int.from_bytes(control[0][2], "little")

        usual = answered(b"first", 20)
        assert usual > 20
        assert answered(b"first", 20) == 19
        assert answered(b"first", 2) == 1
        assert answered(b"first", 255) == 64
        assert answered(b"other", 1) == usual
        one.send(b"other")  # with no hop left: the end of a loop of two kecho servers
        one.send(b"third")
        assert one.recv(100) == b"third"
    assert counted(server).refused["repeated"] == counted(server).refused.total == 1


# ---- clients ----------------------------------------------------------------------------------


def keep_pace(rate: float, count: int) -> Iterator[int]:
    """So many numbers, no two of them closer than 1 / rate seconds: no stall is made up for."""
    for number in range(count):
        due = time.monotonic() + 1 / rate
        yield number
        while (left := due - time.monotonic()) > 0:
            time.sleep(left)


def test_who_repeats_one_datagram_as_often_as_allowed_loses_none(
    start_server: StartServer, dispatch: str
) -> None:
    """A monitor, faster: many more than may come at once, so that each needs its own token."""
    server = echoing(start_server, dispatch=dispatch, udp_rate_repeated=1000)
    with client() as one:
        one.connect((LOOPBACK, server.port))
        for _ in keep_pace(1000, 600):
            one.send(b"are you there?")
            assert one.recv(100) == b"are you there?"
    assert counted(server).refused.total == 0


def test_a_monitor_beside_a_loop_of_the_same_address_loses_none(
    start_server: StartServer, dispatch: str
) -> None:
    server = echoing(start_server, dispatch=dispatch)
    with client(source=LOOPBACK) as monitor, plain_echo() as other:
        monitor.connect((LOOPBACK, server.port))
        for _ in keep_pace(10, 5):
            for data in datagrams_of(50, 100):  # the loop begins anew, again and again
                other.sendto(data, (LOOPBACK, server.port))
            monitor.send(b"are you there?")
            assert monitor.recv(100) == b"are you there?"
    assert counted(server).refused["repeated"] > 0


def test_who_forges_a_client_costs_it_some_of_its_repeats_and_nothing_else(
    start_server: StartServer, dispatch: str
) -> None:
    """What a forger sends comes from the client's own socket here, which is all that a server
    sees."""
    server = echoing(start_server, dispatch=dispatch)
    numbered = [b"number %d" % number for number in range(400)]
    with client() as victim:
        victim.connect((LOOPBACK, server.port))
        answers: list[bytes] = []
        for data in numbered:
            for _ in range(10):
                victim.send(b"forged")
            victim.send(data)
            victim.send(b"are you there?")
            while not answers or answers[-1] != data:
                answers.append(victim.recv(100))
        answers += receive_waiting(victim)
    assert [one for one in answers if one.startswith(b"number")] == numbered
    # One in ten in the mean.
    assert answers.count(b"are you there?") > 0.8 * len(numbered)


def test_at_once_as_many_repeats_are_answered_as_the_kernel_joins(
    start_server: StartServer, dispatch: str
) -> None:
    server = echoing(start_server, dispatch=dispatch)
    with client() as one:
        for _ in range(2):
            send_segments(one, bytes(64), 1, (LOOPBACK, server.port))
        assert receive_all(one, AT_ONCE) == [b"\0"] * AT_ONCE
    assert counted(server).refused.total == 0


def test_a_repeat_that_is_refused_leaves_the_others_of_its_message(
    start_server: StartServer, dispatch: str
) -> None:
    chance = random.Random(3)
    server = echoing(start_server, dispatch=dispatch)
    sent = [b"same" if chance.random() < 0.5 else b"%4d" % number for number in range(40 * 20)]
    with client() as one:
        for begin in range(0, len(sent), 40):
            send_segments(one, b"".join(sent[begin : begin + 40]), 4, (LOOPBACK, server.port))
        answers = receive_waiting(one)
    udp = counted(server)
    assert (udp.received, udp.sent) == (800, 800 - udp.refused["repeated"])
    assert udp.refused["repeated"] > 10
    assert [each for each in answers if each != b"same"] == [
        each for each in sent if each != b"same"
    ]
    assert len(answers) == udp.sent


CLOSED = {"mode": "closed", "depth": 8, "duration": 0.5}
OPEN = {"mode": "open", "rate": 50_000.0, "duration": 3.0}


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize(
    "loop", [CLOSED, pytest.param(OPEN, marks=pytest.mark.release)], ids=["closed", "open"]
)
def test_a_loop_of_the_benchmark_is_not_touched(
    start_server: StartServer, dispatch: str, length: int, loop: dict[str, Any]
) -> None:
    server = echoing(start_server, dispatch=dispatch)
    bench.run(Workload(port=server.port, udp=True, length=length, connections=8, **loop))
    udp = counted(server)
    assert udp.sent > 1000
    assert udp.refused["repeated"] == 0


@pytest.mark.release
def test_numbers_that_begin_again_after_more_than_a_second_are_not_touched(
    start_server: StartServer, dispatch: str
) -> None:
    """16 bits at 50,000 a second."""
    server = echoing(start_server, dispatch=dispatch)
    with client() as one:
        one.connect((LOOPBACK, server.port))
        one.setblocking(False)
        for number in keep_pace(1000, 4000):
            for low in range(50):
                one.send((number * 50 + low & 0xFFFF).to_bytes(2, "little"))
            with contextlib.suppress(BlockingIOError):
                while True:
                    one.recv(100)
    udp = counted(server)
    assert udp.received > 150_000
    assert udp.refused["repeated"] == 0

"""UDP: who is answered, and how many datagrams of his."""

from __future__ import annotations

import socket
import time

import pytest

import kecho
from support.clients import wait_for
from support.fixture_types import StartServer
from support.privileges import needs_root
from support.udp_clients import (
    all_accounted_for,
    client,
    counted,
    receive_all,
    receive_waiting,
    send_segments,
)

LOOPBACK = "127.0.0.1"
SOURCES_KEPT = 4096 * 4  # KECHO_UDP_SETS times KECHO_UDP_WAYS


@pytest.fixture
def server(start_server: StartServer, dispatch: str) -> kecho.Server:
    """A server with UDP on every address of this host, under each dispatch."""
    return start_server(dispatch=dispatch, udp=True, host="0.0.0.0")


# ---- who is not answered ----------------------------------------------------------------------


@needs_root
def test_a_low_source_port_is_not_answered(server: kecho.Server) -> None:
    with client(source="127.0.0.3", port=7) as low:
        low.sendto(b"?", (LOOPBACK, server.port))
        wait_for(lambda: counted(server).refused["port"] == 1, "it is refused")
        assert receive_waiting(low) == []
    assert counted(server).sent == 0


def test_the_lowest_source_port_is_an_option(start_server: StartServer, dispatch: str) -> None:
    with client(source=LOOPBACK) as one, client(source=LOOPBACK) as other:
        ports = sorted([one.getsockname()[1], other.getsockname()[1]])
        server = start_server(dispatch=dispatch, udp=True, udp_min_source_port=ports[1])
        for each in (one, other):
            each.sendto(b"?", (LOOPBACK, server.port))
        higher = one if one.getsockname()[1] == ports[1] else other
        assert higher.recv(10) == b"?"
        wait_for(lambda: counted(server).refused["port"] == 1, "the lower one is refused")


def test_the_own_port_is_not_answered_from_any_address(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, udp=True)
    with client(source="127.0.0.77", port=server.port) as twin:
        twin.sendto(b"?", (LOOPBACK, server.port))
        wait_for(lambda: counted(server).refused["own_port"] == 1, "it is refused")
        assert receive_waiting(twin) == []


@pytest.mark.parametrize("asked", ["127.255.255.255", "224.0.0.1"])
def test_broadcast_and_multicast_are_not_answered(server: kecho.Server, asked: str) -> None:
    with client(source=LOOPBACK) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
        one.sendto(b"?", (asked, server.port))
        one.sendto(b"!", (LOOPBACK, server.port))
        assert receive_waiting(one, least=1) == [b"!"]
    udp = counted(server)
    # Not every multicast group is delivered to a socket that has not joined it: ip(7).
    assert udp.refused["address"] == udp.received - 1
    if asked.endswith(".255"):
        # Every socket of a SO_REUSEPORT group gets a broadcast.
        assert udp.refused["address"] == (1 if server.config.dispatch == "shared" else 2)


# ---- allow and deny -------------------------------------------------------------------------

SOURCES = ["127.0.0.1", "127.0.0.2", "127.0.1.1", "127.1.0.1", "127.1.2.3", "127.255.255.254"]


@pytest.mark.parametrize(
    ("allow", "deny", "expected"),
    [
        (["127.0.0.0/8"], [], SOURCES),
        (["127.0.0.1"], [], ["127.0.0.1"]),
        ([], ["127.0.0.1"], SOURCES[1:]),
        (["::/0"], [], []),
        (["0.0.0.0/0"], ["::/0"], SOURCES),
        (["127.1.0.0/16"], ["127.1.2.0/24"], ["127.1.0.1"]),
        (["127.1.2.3/32"], ["127.0.0.0/8"], ["127.1.2.3"]),
        (["::ffff:127.0.0.0/120"], ["::1"], ["127.0.0.1", "127.0.0.2"]),
    ],
    ids=str,
)
def test_datagrams_are_answered_to_those_who_are_allowed(
    start_server: StartServer, dispatch: str, allow: list[str], deny: list[str], expected: list[str]
) -> None:
    server = start_server(dispatch=dispatch, udp=True, allow=allow, deny=deny)
    answered = []
    for source in SOURCES:
        with client(source=source) as one:
            send_segments(one, b"?" * 30, 10, (LOOPBACK, server.port))
            refused = SOURCES.index(source) + 1 - len(answered)
            wait_for(
                lambda refused=refused: (
                    counted(server).sent == 3 * len(answered) + 3
                    or counted(server).refused["denied"] == 3 * refused
                ),
                "it is answered or refused",
            )
            if counted(server).sent > 3 * len(answered):
                assert receive_all(one, 3) == [b"?" * 10] * 3
                answered.append(source)
    assert answered == expected
    udp = counted(server)
    assert udp.refused["denied"] == udp.refused.total == 3 * (len(SOURCES) - len(expected))


def test_datagrams_over_ipv6_have_rules_of_their_own(
    start_server: StartServer, dispatch: str
) -> None:
    try:
        with client(socket.AF_INET6, "::1"):
            pass
    except OSError:
        pytest.skip("this host has no ::1")
    for allowed, family, address in (
        ("::1", socket.AF_INET6, "::1"),
        ("127.0.0.1", socket.AF_INET, LOOPBACK),
    ):
        server = start_server(dispatch=dispatch, udp=True, host=(LOOPBACK, "::1"), allow=[allowed])
        with client(socket.AF_INET6) as six, client() as four:
            six.sendto(b"six", ("::1", server.port))
            four.sendto(b"four", (LOOPBACK, server.port))
            one = six if family == socket.AF_INET6 else four
            assert one.recvfrom(10)[1][0] == address
            wait_for(
                lambda server=server: counted(server).refused["denied"] == 1, "the other is refused"
            )


def test_who_is_denied_takes_nothing_from_the_rates(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, udp=True, deny="127.0.0.2", udp_rate_total=1)
    with client(source="127.0.0.2") as denied, client(source="127.0.0.3") as one:
        for _ in range(300):  # more than the burst
            denied.sendto(b"no", (LOOPBACK, server.port))
        wait_for(lambda: counted(server).refused["denied"] == 300, "they are refused")
        one.sendto(b"yes", (LOOPBACK, server.port))
        assert one.recv(10) == b"yes"


# ---- how many are answered --------------------------------------------------------------------


def flood(target: tuple[str, int], source: str, count: int, until_s: float = 30.0) -> None:
    with client(source=source) as one:
        end = time.monotonic() + until_s
        for number in range(count):
            one.sendto(b"%d" % number, target)
            if number % 32 == 31:
                time.sleep(0.001)  # the receive queue holds a few hundred
            if time.monotonic() > end:
                return


def test_one_source_has_a_rate_and_a_burst(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=10)
    began = time.monotonic()
    flood((LOOPBACK, server.port), "127.0.0.2", 1000)
    wait_for(lambda: (udp := counted(server)).received + udp.dropped == 1000, "all are counted")
    lasted = time.monotonic() - began
    udp = counted(server)
    assert 128 <= udp.sent <= 128 + 10 * lasted + 1
    assert udp.refused["rate"] == udp.received - udp.sent
    assert all_accounted_for(udp)
    with client(source="127.0.0.3") as other:
        other.sendto(b"other", (LOOPBACK, server.port))
        assert other.recv(10) == b"other"


def test_a_bucket_fills_up_again(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=100)
    with client(source="127.0.0.2") as one:
        for _ in range(600):  # those that are refused take nothing from the bucket
            one.sendto(b"?", (LOOPBACK, server.port))
        receive_waiting(one)
        assert counted(server).refused["rate"] > 0
        time.sleep(0.2)
        one.sendto(b"again", (LOOPBACK, server.port))
        assert one.recv(10) == b"again"


def test_joined_datagrams_are_counted_one_by_one(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=1)
    with client(source="127.0.0.2") as one:
        for _ in range(5):
            send_segments(one, bytes(range(60)), 1, (LOOPBACK, server.port))
        answered = receive_waiting(one, least=128)
    udp = counted(server)
    assert udp.received == 300
    assert 128 <= udp.sent == len(answered) < 140
    assert udp.refused["rate"] == 300 - udp.sent
    assert answered[:60] == [bytes([number]) for number in range(60)]


def test_all_sources_together_have_a_rate(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=0, udp_rate_total=10)
    began = time.monotonic()
    for last in range(2, 12):
        flood((LOOPBACK, server.port), f"127.0.0.{last}", 50)
    wait_for(lambda: (udp := counted(server)).received + udp.dropped == 500, "all are counted")
    lasted = time.monotonic() - began
    udp = counted(server)
    assert 128 <= udp.sent <= 128 + 10 * lasted + 1
    assert udp.refused["rate_total"] == udp.received - udp.sent > 0
    assert udp.refused["rate"] == 0


def test_no_limit_is_no_limit(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=0, udp_rate_total=0)
    flood((LOOPBACK, server.port), "127.0.0.2", 2000)
    wait_for(lambda: (udp := counted(server)).received + udp.dropped == 2000, "all are counted")
    assert counted(server).refused.total == 0


def test_the_table_of_sources_is_bounded_and_still_limits(
    start_server: StartServer, dispatch: str
) -> None:
    """More sources than it has places; each is answered, and one that floods is still limited."""
    server = start_server(dispatch=dispatch, udp=True, udp_rate=1, udp_rate_total=0)
    target = (LOOPBACK, server.port)
    for number in range(SOURCES_KEPT + 500):
        # Not an ephemeral port, which may happen to be the server's own.
        with client(source=f"127.1.{number >> 8}.{number & 255}", port=5000) as one:
            one.sendto(b"?", target)
            assert one.recv(10) == b"?"
    flood(target, "127.0.0.2", 1000)
    wait_for(lambda: counted(server).refused["rate"] > 500, "the flood is limited")

"""Whom a limit per address counts as one client, and that nobody can aim at the tables."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.clients import DEADLINE_S, echo, reset
from support.fixture_types import StartServer
from support.namespaces import Namespace
from support.server_process import ServerProcess
from support.udp_clients import receive_waiting

pytestmark = pytest.mark.privileged

IPV6_FREEBIND = 78  # <linux/in6.h>
LINKS = ("here1", "here2")


@pytest.fixture
def linked(inside: Namespace) -> Namespace:
    """This network has two Ethernets, on both of which it is fe80::1, ::2 and ::3."""
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")
    for number, link in enumerate(LINKS, 1):
        inside.run("ip", "link", "add", link, "type", "veth", "peer", "name", f"there{number}")
        for last in (1, 2, 3):
            inside.run("ip", "address", "add", f"fe80::{last}/64", "dev", link, "nodad")
        for name in (link, f"there{number}"):
            inside.run("ip", "link", "set", name, "up")
    inside.run("ip", "address", "add", "2001:db8::1/64", "dev", "lo", "nodad")
    inside.run("ip", "address", "add", "2001:db8::2/64", "dev", "lo", "nodad")
    return inside


def from_to(source: str, destination: str, link: str, port: int, kind: int) -> socket.socket:
    scope = socket.if_nametoindex(link)
    one = socket.socket(socket.AF_INET6, kind)
    try:
        one.settimeout(DEADLINE_S)
        one.bind((source, 0, 0, scope))
        one.connect((destination, port, 0, scope))
    except OSError:
        one.close()
        raise
    return one


@pytest.mark.usefixtures("linked")
def test_link_local_clients_are_counted_by_address_and_link(start_server: StartServer) -> None:
    server = start_server(host="::", max_connections_per_ip=1)
    with ExitStack() as stack:

        def come(source: str, link: str) -> bool:
            destination = "fe80::1" if source.startswith("fe80") else "2001:db8::1"
            try:
                one = from_to(source, destination, link, server.port, socket.SOCK_STREAM)
                return echo(stack.enter_context(one), b"hello") == b"hello"
            except ConnectionError:
                return False

        here = [come(f"fe80::{last}", link) for link in LINKS for last in (2, 3)]
        again = [come(f"fe80::{last}", link) for link in LINKS for last in (2, 3)]
        routed = [come(f"2001:db8::{last}", "lo") for last in (1, 2)]
    assert (here, again) == ([True] * 4, [False] * 4)
    assert routed == [True, False]  # one /64 is one client


@pytest.mark.usefixtures("linked")
def test_link_local_sources_have_a_rate_each(start_server: StartServer) -> None:
    server = start_server(host="::", udp=True, udp_rate=1)

    def answered(source: str, link: str) -> int:
        """Of 200 datagrams; a bucket holds 128."""
        with from_to(source, "fe80::1", link, server.port, socket.SOCK_DGRAM) as one:
            for number in range(200):
                one.send(number.to_bytes(8))
            return len(receive_waiting(one))

    for link in LINKS:
        for source in ("fe80::2", "fe80::3"):
            assert 100 <= answered(source, link) <= 140
    assert answered("fe80::2", LINKS[0]) <= 10


# ---- nobody can aim -----------------------------------------------------------------------------

# What the table's place of a /64 once was: bits 32 and on of its product with this.
OPEN_MULTIPLIER = 0x9E3779B97F4A7C15
PEERS = 40_000


def chosen(count: int) -> Iterator[str]:
    """Global unicast /64s whose products end alike in what any table of 2**17 places looks at."""
    inverse = pow(OPEN_MULTIPLIER, -1, 1 << 64)
    numbers = random.Random(1)
    while count:
        prefix = (numbers.getrandbits(15) << 49 | numbers.getrandbits(32)) * inverse % (1 << 64)
        if prefix >> 61 == 1:
            yield socket.inet_ntop(socket.AF_INET6, struct.pack(">QQ", prefix, 1))
            count -= 1


def at_random(count: int) -> Iterator[str]:
    numbers = random.Random(2)
    for _ in range(count):
        prefix = 1 << 61 | numbers.getrandbits(61)
        yield socket.inet_ntop(socket.AF_INET6, struct.pack(">QQ", prefix, 1))


def user_time_s(pid: int) -> float:
    """Without what the kernel takes to accept a connection: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def cost_s(sources: Iterator[str]) -> float:
    """Seconds of CPU of a server to which each of these comes once."""
    with ServerProcess(["--host=::1", "--max-connections-per-ip=1", "--threads=1"]) as server:
        server.wait_until_listening()
        before_s = user_time_s(server.pid)
        for source in sources:
            with socket.socket(socket.AF_INET6) as one:
                one.settimeout(DEADLINE_S)
                one.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                one.bind((source, 0))
                one.connect(("::1", server.port))
                reset(one)
        with socket.create_connection(("::1", server.port), timeout=DEADLINE_S) as last:
            assert echo(last, b"x") == b"x"
        return user_time_s(server.pid) - before_s


@pytest.mark.release
@pytest.mark.alone
def test_chosen_prefixes_cost_no_more_than_any_others(inside: Namespace) -> None:
    inside.run("ip", "-6", "route", "add", "local", "2000::/3", "dev", "lo")
    assert cost_s(chosen(PEERS)) < 2.5 * cost_s(at_random(PEERS))

"""UDP against spoofed packets and between hosts: raw sockets and network namespaces."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import kecho
from support.clients import random_bytes, wait_for
from support.namespaces import Namespace
from support.udp_clients import (
    client,
    counted,
    forged,
    receive_waiting,
    send_forged,
    send_segments,
)
from support.udp_loops import datagrams_of, wait_for_the_end

pytestmark = pytest.mark.privileged

DISPATCHES = pytest.mark.parametrize("dispatch", ["shared", "percpu"])
SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40  # <linux/sockios.h>, <linux/if.h>
SERVER_V4, CLIENT_V4 = "192.0.2.1", "192.0.2.2"
SERVER_V6, SERVER_V6_OTHER, CLIENT_V6 = "2001:db8::1", "2001:db8::5", "2001:db8::2"


@contextmanager
def serving(namespace: Namespace, **options: object) -> Iterator[kecho.Server]:
    """A server with UDP in `namespace`, whose sockets stay there."""
    server = kecho.Server(**{"port": 0, "udp": True, "threads": 2, **options})
    with namespace:
        server.start()
    try:
        yield server
    finally:
        server.stop(graceful_timeout=0)


def packets(namespace: Namespace) -> int:
    """UDP datagrams received in the namespace, answered or not: /proc/net/snmp."""
    with namespace, open(f"/proc/self/task/{threading.get_native_id()}/net/snmp") as table:
        names, values = [line.split() for line in table if line.startswith("Udp:")]
    return int(values[names.index("InDatagrams")]) + int(values[names.index("NoPorts")])


@DISPATCHES
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_packet_from_the_servers_own_port_makes_no_loop(
    namespace: Namespace, dispatch: str, host: str
) -> None:
    with serving(namespace, dispatch=dispatch, host=host) as server:
        before = packets(namespace)
        with namespace:
            for source in ("127.0.0.1", "127.0.0.9"):
                send_forged((source, server.port), ("127.0.0.1", server.port), b"round")
        wait_for(lambda: counted(server).refused["own_port"] == 2, "both are refused")
        time.sleep(0.3)  # a loop runs tens of thousands of times in it
        assert packets(namespace) - before == 2
        assert counted(server).sent == 0


@DISPATCHES
@pytest.mark.parametrize("port", [0, 7, 19, 1023])
def test_a_packet_from_another_echo_makes_no_loop(
    namespace: Namespace, dispatch: str, port: int
) -> None:
    """On the other side stands what would answer an answer."""
    with serving(namespace, dispatch=dispatch) as server:
        with namespace:
            reflector = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with reflector:
                reflector.bind(("127.0.0.2", port))
                reflector.settimeout(0.3)
                before = packets(namespace)
                send_forged(("127.0.0.2", port), ("127.0.0.1", server.port), b"round")
                wait_for(lambda: counted(server).refused["port"] == 1, "it is refused")
                with pytest.raises(TimeoutError):
                    reflector.recv(100)
        assert packets(namespace) - before == 1
        assert counted(server).sent == 0


def test_a_loop_is_what_the_guard_prevents(namespace: Namespace) -> None:
    """The same packet, between two high ports that both answer, with no limit of repeats."""
    with (
        serving(namespace, udp_rate=200, udp_rate_repeated=0) as one,
        serving(namespace, udp_rate=200, udp_rate_repeated=0) as other,
    ):
        with namespace:
            send_forged(("127.0.0.1", other.port), ("127.0.0.1", one.port), b"round")
        wait_for(
            lambda: counted(one).refused["rate"] + counted(other).refused["rate"] > 0,
            "the rate ends the loop",
        )
        sent = counted(one).sent, counted(other).sent
        assert max(sent) >= 128
        time.sleep(0.3)
        assert (counted(one).sent, counted(other).sent) == sent


@DISPATCHES
@pytest.mark.parametrize("source", ["0.0.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"])
def test_a_source_that_is_nobodys_address_is_not_answered(
    namespace: Namespace, dispatch: str, source: str
) -> None:
    """The kernel drops such packets when they come from outside, not from the loopback."""
    with serving(namespace, dispatch=dispatch, host="0.0.0.0") as server:
        with namespace, client() as honest:
            send_forged((source, 5000), ("127.0.0.1", server.port), b"?")
            honest.sendto(b"!", ("127.0.0.1", server.port))
            assert honest.recv(10) == b"!"
        udp = counted(server)
        assert (udp.received, udp.sent, udp.refused["address"]) == (2, 1, 1)


# ---- two hosts --------------------------------------------------------------------------------


def is_running(device: str) -> bool:
    """Whether it carries packets: netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        told = fcntl.ioctl(one, SIOCGIFFLAGS, struct.pack("16sH22x", device.encode(), 0))
    return bool(struct.unpack_from("16xH", told)[0] & IFF_RUNNING)


@pytest.fixture
def hosts(new_namespace: Callable[[], Namespace]) -> tuple[Namespace, Namespace]:
    """The server's and the client's, joined by a veth pair."""
    server, client_side = new_namespace(), new_namespace()
    server.run(
        *("ip", "link", "add", "name", "veth0", "type", "veth"),
        *("peer", "name", "veth1", "netns", f"/proc/{os.getpid()}/fd/{client_side.fd}"),
    )
    for side, name, addresses in (
        (server, "veth0", (f"{SERVER_V4}/24", f"{SERVER_V6}/64", f"{SERVER_V6_OTHER}/64")),
        (client_side, "veth1", (f"{CLIENT_V4}/24", f"{CLIENT_V6}/64")),
    ):
        for address in addresses:
            nodad = ("nodad",) if ":" in address else ()
            side.run("ip", "address", "add", address, "dev", name, *nodad)
        side.run("ip", "link", "set", name, "addrgenmode", "none")
        link_local = f"fe80::{1 if side is server else 2}/64"
        side.run("ip", "address", "add", link_local, "dev", name, "nodad")
        side.run("ip", "link", "set", name, "up")
    for side, name in ((server, "veth0"), (client_side, "veth1")):
        with side:  # what is sent before is lost
            wait_for(lambda name=name: is_running(name), "the link is up")
    return server, client_side


@DISPATCHES
@pytest.mark.parametrize("asked", [SERVER_V6, SERVER_V6_OTHER])
def test_the_ipv6_address_that_was_asked_answers(
    hosts: tuple[Namespace, Namespace], dispatch: str, asked: str
) -> None:
    with (
        serving(hosts[0], dispatch=dispatch, host="::") as server,
        hosts[1],
        client(socket.AF_INET6) as one,
    ):
        for size in (0, 1, 1400, 1453, 65507):
            data = random_bytes(size)
            one.sendto(data, (asked, server.port))
            reply, source = one.recvfrom(65536)
            assert (reply, source[:2]) == (data, (asked, server.port))
        send_segments(one, random_bytes(13_000), 1000, (asked, server.port))
        assert b"".join(receive_waiting(one, least=13)) == random_bytes(13_000)


@DISPATCHES
def test_a_link_local_address_answers_on_its_link(
    hosts: tuple[Namespace, Namespace], dispatch: str
) -> None:
    with serving(hosts[0], dispatch=dispatch, host="::") as server, hosts[1]:
        link = socket.if_nametoindex("veth1")
        with client(socket.AF_INET6) as one:
            one.sendto(b"?", ("fe80::1", server.port, 0, link))
            reply, source = one.recvfrom(10)
            assert (reply, source[1], source[3]) == (b"?", server.port, link)
            assert source[0].startswith("fe80::1")


@DISPATCHES
@pytest.mark.parametrize("count", [1, 50, 1000])
def test_a_loop_of_servers_on_two_hosts_ends(
    hosts: tuple[Namespace, Namespace], dispatch: str, count: int
) -> None:
    with (
        serving(hosts[0], dispatch=dispatch, host="0.0.0.0") as one,
        serving(hosts[1], dispatch=dispatch, host="0.0.0.0") as other,
    ):
        with hosts[1]:
            for data in datagrams_of(count, 1000):
                send_forged((CLIENT_V4, other.port), (SERVER_V4, one.port), data)
        assert wait_for_the_end([one, other], count) <= 68 * count
        assert counted(one).sent > 0


@DISPATCHES
def test_the_addresses_of_a_64_have_one_rate(
    hosts: tuple[Namespace, Namespace], dispatch: str
) -> None:
    hosts[1].run("ip", "address", "add", "2001:db8::3/64", "dev", "veth1", "nodad")
    with (
        serving(hosts[0], dispatch=dispatch, host="::", udp_rate=1) as server,
        hosts[1],
        client(socket.AF_INET6, CLIENT_V6) as one,
        client(socket.AF_INET6, "2001:db8::3") as other,
    ):
        for number in range(300):
            one.sendto(b"%d" % number, (SERVER_V6, server.port))
        wait_for(lambda: counted(server).refused["rate"] > 100, "they have none left")
        other.sendto(b"?", (SERVER_V6, server.port))
        assert receive_waiting(other) == []


@DISPATCHES
@pytest.mark.parametrize(
    ("family", "asked", "honest"),
    [
        (socket.AF_INET, "192.0.2.255", SERVER_V4),
        (socket.AF_INET, "255.255.255.255", SERVER_V4),
        (socket.AF_INET, "224.0.0.1", SERVER_V4),
        (socket.AF_INET6, "ff02::1", SERVER_V6),
    ],
)
def test_who_asks_everybody_gets_no_answer(
    hosts: tuple[Namespace, Namespace],
    dispatch: str,
    family: socket.AddressFamily,
    asked: str,
    honest: str,
) -> None:
    host = "0.0.0.0" if family == socket.AF_INET else "::"
    with serving(hosts[0], dispatch=dispatch, host=host) as server, hosts[1]:
        link = socket.if_nametoindex("veth1")
        hosts[1].run("ip", "route", "replace", "default", "dev", "veth1")
        with client(family) as one:
            if family == socket.AF_INET:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                to: tuple[object, ...] = (asked, server.port)
            else:
                to = (asked, server.port, 0, link)
            one.sendto(b"?", to)
            one.sendto(b"!", (honest, server.port))
            assert receive_waiting(one, least=1) == [b"!"]
        udp = counted(server)
        assert udp.sent == 1
        assert udp.refused["address"] == udp.received - 1 > 0


@DISPATCHES
def test_a_way_that_cannot_carry_joined_replies_gets_them_one_by_one(
    hosts: tuple[Namespace, Namespace], dispatch: str
) -> None:
    """Segments longer than the MTU of the way back: sendmmsg says EMSGSIZE."""
    with serving(hosts[0], dispatch=dispatch, host="0.0.0.0") as server:
        hosts[0].run("ip", "route", "replace", f"{CLIENT_V4}/32", "dev", "veth0", "mtu", "1000")
        data = random_bytes(1400 * 20 + 7)
        with hosts[1], client() as one:
            send_segments(one, data, 1400, (SERVER_V4, server.port))
            assert b"".join(receive_waiting(one, least=21)) == data
        udp = counted(server)
        assert udp.received == udp.sent == 21
        assert udp.errors.total == 0


@DISPATCHES
def test_a_firewall_that_forbids_the_reply_is_counted(
    hosts: tuple[Namespace, Namespace], dispatch: str
) -> None:
    with serving(hosts[0], dispatch=dispatch, host="0.0.0.0") as server:
        hosts[0].run("ip", "route", "add", "prohibit", "198.51.100.0/24")
        with hosts[1], client() as one:
            one.sendto(b"!", (SERVER_V4, server.port))
            assert one.recv(10) == b"!"
        hosts[0].set("net.ipv4.conf.all.rp_filter", 0)
        hosts[0].set("net.ipv4.conf.veth0.rp_filter", 0)
        with hosts[1]:
            send_forged(("198.51.100.1", 5000), (SERVER_V4, server.port), b"?")
        wait_for(lambda: counted(server).errors.total == 1, "the reply is lost and counted")
        assert counted(server).errors["denied"] == 1


@DISPATCHES
def test_replies_that_wait_for_a_neighbour_do_not_hold_up_the_worker(
    hosts: tuple[Namespace, Namespace], dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Packets for a host that does not answer ARP fill the send buffer: EAGAIN, for a while."""
    hosts[0].set("net.ipv4.neigh.veth0.unres_qlen_bytes", 1 << 28)
    hosts[0].set("net.ipv4.neigh.veth0.retrans_time_ms", 300)
    with serving(hosts[0], dispatch=dispatch, host="0.0.0.0") as server:
        packet = forged(("192.0.2.99", 5000), (SERVER_V4, server.port), bytes(1400))

        def is_full() -> bool:
            for _ in range(512):
                raw.sendto(packet, (SERVER_V4, 0))
            return counted(server).errors["full"] > 0

        with hosts[1], socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            wait_for(is_full, "the send buffer is full")
        udp = counted(server)
        assert udp.errors["full"] == udp.errors.total
        with hosts[1], client() as one:
            one.settimeout(0.2)

            def is_answered() -> bool:
                one.sendto(b"!", (SERVER_V4, server.port))
                try:
                    return one.recv(10) == b"!"
                except TimeoutError:
                    return False

            wait_for(is_answered, "others are answered once the neighbour is given up")

        def warnings() -> list[str]:
            return [line for line in caplog.messages if "answers lost" in line]

        wait_for(warnings, "it is told, with what helps")
        assert "net.ipv4.neigh.DEV.unres_qlen_bytes" in warnings()[0]


def test_neighbours_that_are_not_there_cost_others_nothing_with_what_the_warning_says(
    hosts: tuple[Namespace, Namespace],
) -> None:
    """A spoofer names addresses of the server's link that nobody has."""
    for side, name in zip(hosts, ("veth0", "veth1"), strict=True):
        side.run("ip", "link", "set", name, "mtu", "9000")
    hosts[0].run("ip", "route", "add", "198.18.0.0/16", "dev", "veth0")
    hosts[0].set("net.ipv4.neigh.veth0.unres_qlen_bytes", 2048)
    with (
        serving(hosts[0], host="0.0.0.0") as server,
        hosts[1],
        client() as one,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 8 << 20:
            pytest.skip("net.core.wmem_max is less than 4 MiB")
        for number in range(600):  # what 300 answers of this size take is more than 2 MiB
            source = f"198.18.{number // 100 % 3}.{number % 100 + 1}"
            packet = forged((source, 5000), (SERVER_V4, server.port), bytes(8000))
            raw.sendto(packet, (SERVER_V4, 0))
            if number % 50 == 49:  # the receive buffer is not what is tried
                wait_for(lambda sent=number + 1: counted(server).received == sent, "they came")
        for number in range(50):
            one.sendto(number.to_bytes(8), (SERVER_V4, server.port))
        assert len(receive_waiting(one, least=50)) == 50
        udp = counted(server)
        assert udp.received == udp.sent > 600
        assert udp.errors.total == 0


@DISPATCHES
def test_a_socket_destroyed_from_outside_goes_on(namespace: Namespace, dispatch: str) -> None:
    """`ss -K` on UDP leaves an error (ECONNABORTED); the socket stays bound."""
    if shutil.which("ss") is None:
        pytest.skip("needs ss, which iproute2 has")
    with serving(namespace, dispatch=dispatch) as server, namespace, client() as one:
        one.sendto(b"1", ("127.0.0.1", server.port))
        assert one.recv(10) == b"1"
        killed = namespace.run("ss", "-K", "-u", "-a", "-n", "sport", "=", f":{server.port}")
        if str(server.port) not in killed:
            pytest.skip("this kernel destroys no UDP sockets")
        wait_for(lambda: counted(server).errors["recv"] > 0, "the error is met")
        for _ in range(20):
            one.sendto(b"2", ("127.0.0.1", server.port))
            assert one.recv(10) == b"2"
        assert counted(server).errors["recv"] <= 2

"""Accept queues that overflow: what is counted and warned about."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kecho.system.netstat import tcp_counters
from support.clients import connect, connected, echo, reset, wait_for
from support.fixture_types import StartServer
from support.logs import said
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged


@contextlib.contextmanager
def knocking(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Clients that call connect and do not wait for it. They end with RST: the kernel would go on
    to send the FIN of one that was established on its own side only, and drop it each time."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = socket.socket()
            stack.callback(reset, client)
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            clients.append(client)
        yield clients


def test_dropped_syns_are_warned_about_as_the_kernel_counts_them(
    inside: Namespace,
    start_server: StartServer,
    dispatch: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    server = start_server(dispatch=dispatch, backlog=1, max_connections=1, threads=2)
    before = tcp_counters(["ListenDrops"])["ListenDrops"]

    def drops() -> int:
        return tcp_counters(["ListenDrops"])["ListenDrops"] - before

    with connect(server) as held:  # with it the server is full, and its accept queues wait
        assert echo(held, b"x") == b"x"
        with knocking(server.port, 30):
            # 30, less what the queues hold, and each of them once more after a second.
            wait_for(lambda: server.stats().dropped_syns >= 30, "SYNs are dropped")
            queues = server.stats().accept_queues
            assert max(one.length for one in queues) == 2
            assert {one.length_most for one in queues} == {1}
        # The last of them may be under way still.
        wait_for(lambda: server.stats().dropped_syns == drops(), "the kernel's number")
        time.sleep(0.2)
        dropped = drops()
        assert server.stats().dropped_syns == dropped
        pattern = r"(\d+) SYNs dropped in the last .+, the accept queue was full \(now \d of 1;"
        wait_for(
            lambda: sum(int(one[1]) for one in said(caplog, pattern)) == dropped,
            "all of them are warned about",
        )
        assert said(caplog, rf"127\.0\.0\.1:{server.port}: .* backlog 1, .*: --backlog 1024")
        warnings = len(caplog.records)
        time.sleep(2.5)
        assert len(caplog.records) == warnings  # nothing overflows any more
    assert server.stop().dropped_syns == dropped


@pytest.mark.release
def test_a_flood_makes_fewer_lines_the_longer_it_lasts(
    inside: Namespace, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    server = start_server(backlog=1, max_connections=1)
    with connect(server) as held:
        assert echo(held, b"x") == b"x"
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with knocking(server.port, 10):
                time.sleep(0.2)
        # At 0, 1, 3, 7 and 15 s, of two kinds at most.
        lines = said(caplog, "SYNs dropped|SYN queue")
        assert 3 <= len(lines) <= 10
        assert "in the last 8 s" in lines[-1].string
    assert server.stop().dropped_syns > 500


def test_checks_of_a_load_balancer_are_no_syns_that_found_the_queue_full(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    """SYN, SYN-ACK, RST, as HAProxy's: the listener counts the RST among what it dropped."""
    server = start_server(dispatch=dispatch, backlog=1024)
    before = sum(drops_of_listeners(server.port))
    for _ in range(20):
        with socket.socket() as check:
            check.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            check.connect(("127.0.0.1", server.port))
            reset(check)
    wait_for(lambda: sum(drops_of_listeners(server.port)) >= before + 20, "they are counted")
    assert server.stats().dropped_syns == 0
    assert server.stop().dropped_syns == 0


def drops_of_listeners(port: int) -> list[int]:
    """Of this process, by SO_MEMINFO."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        if not Path("/proc/self/fd", name).is_socket():
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.getsockname()[1:2] == (port,) and one.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN
            ):
                found.append(dropped_by(one))
    return found


def dropped_by(one: socket.socket) -> int:
    """SK_MEMINFO_DROPS of SO_MEMINFO, socket(7)."""
    dropped: int = struct.unpack("=9I", one.getsockopt(socket.SOL_SOCKET, 55, 36))[8]
    return dropped


def test_what_an_inherited_socket_dropped_before_is_not_this_servers(
    inside: Namespace,
    start_server: StartServer,
    dispatch: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    with socket.create_server(("127.0.0.1", 0), backlog=1) as given:
        with knocking(given.getsockname()[1], 20):
            wait_for(lambda: dropped_by(given) >= 18, "SYNs are dropped")
        before = dropped_by(given)
        server = start_server(fd=given.fileno(), dispatch=dispatch, max_connections=1)
        assert server.stats().dropped_syns == 0
        wait_for(lambda: server.stats().active == 0, "those who had come have left")
        with connect(server) as held:
            assert echo(held, b"x") == b"x"
            with knocking(server.port, 20):
                wait_for(lambda: dropped_by(given) - before >= 18, "more are dropped")
                wait_for(
                    lambda: server.stats().dropped_syns == dropped_by(given) - before,
                    "the new ones are counted",
                )
                wait_for(lambda: said(caplog, "SYNs dropped"), "they are warned about")
                assert said(caplog, r"backlog 1, .*: have whoever opened it ask for 1024")
        pattern = r"(\d+) SYNs dropped"
        assert sum(int(one[1]) for one in said(caplog, pattern)) <= dropped_by(given) - before
        assert server.stop().dropped_syns == dropped_by(given) - before


def test_nothing_is_said_when_nothing_overflows(
    inside: Namespace, start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    server = start_server(dispatch=dispatch, backlog=128)
    with connected(server, 100) as clients:
        assert all(echo(client, b"x") == b"x" for client in clients)
        time.sleep(1.5)
    assert server.stop().dropped_syns == 0
    assert not caplog.records


def test_a_full_syn_queue_is_warned_about(
    inside: Namespace, start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Half-open connections: the SYN-ACKs are lost on their way to the clients."""
    caplog.set_level(logging.WARNING, "kecho")
    if shutil.which("nft") is None:
        pytest.skip("needs nft, which nftables has")
    inside.run("nft", "add", "table", "ip", "kecho")
    chain = "{ type filter hook input priority 0; }"
    inside.run("nft", "add", "chain", "ip", "kecho", "input", chain)
    lost = ("tcp", "flags", "&", "(syn|ack)", "==", "(syn|ack)", "drop")
    inside.run("nft", "add", "rule", "ip", "kecho", "input", *lost)
    server = start_server(dispatch=dispatch, backlog=8)
    before = tcp_counters(["TCPReqQFullDoCookies"])["TCPReqQFullDoCookies"]
    with knocking(server.port, 200):
        pattern = r"a SYN queue was full in the last .+: (\d+) SYN cookies sent"
        wait_for(lambda: len(said(caplog, pattern)) >= 2, "it is warned about, twice")

    def cookies() -> int:
        return tcp_counters(["TCPReqQFullDoCookies"])["TCPReqQFullDoCookies"] - before

    assert cookies() > 0
    wait_for(
        lambda: sum(int(one[1]) for one in said(caplog, pattern)) == cookies(),
        "all of them are warned about",
    )


def test_a_port_scan_is_no_full_queue(
    inside: Namespace, start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    server = start_server(dispatch=dispatch)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        ends = socket.inet_aton("127.0.0.1") * 2
        for port in range(40000, 40009):  # a segment without any flag
            header = port.to_bytes(2, "big") + server.port.to_bytes(2, "big") + bytes(8)
            header += b"\x50\x00\xff\xff" + bytes(4)
            total = sum(
                int.from_bytes((ends + b"\0\x06\0\x14" + header)[i : i + 2], "big")
                for i in range(0, 32, 2)
            )
            total = (total & 0xFFFF) + (total >> 16)
            checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
            raw.sendto(header[:16] + checksum.to_bytes(2, "big") + header[18:], ("127.0.0.1", 0))
    time.sleep(1.5)
    assert not caplog.records

"""Networks of our own: what needs another host, a lossy line, or other settings of the kernel."""

from __future__ import annotations

import hashlib
import os
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kecho import ListenError, ServerConfig
from kecho.server.sockets.listen import open_listeners
from support.clients import (
    DEADLINE_S,
    closed,
    connect,
    echo,
    random_bytes,
    receive_until_end,
    transfer,
    transfer_all,
    wait_for,
)
from support.engines import needs_sockmap
from support.fixture_types import StartServer
from support.namespaces import Namespace
from support.server_process import ServerProcess, after

pytestmark = pytest.mark.privileged


LOSS_PERCENT = 5


@dataclass(frozen=True)
class Pair:
    """Two hosts, and an Ethernet between them."""

    server: Namespace
    client: Namespace

    SERVER_V4 = "198.51.100.1"
    SERVER_V6 = "2001:db8::1"
    SERVER_LINK_LOCAL = "fe80::1"

    def connect(self, address: str, port: int) -> socket.socket:
        with self.client:
            return socket.create_connection((address, port), timeout=DEADLINE_S)


@pytest.fixture
def pair(new_namespace: Callable[[], Namespace]) -> Pair:
    server, client = new_namespace(), new_namespace()
    try:
        server.run("ip", "link", "add", "kecho-s", "type", "veth", "peer", "name", "kecho-c")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no veth pair can be made: {error.stderr.strip()}")
    server.run("ip", "link", "set", "kecho-c", "netns", f"/proc/{os.getpid()}/fd/{client.fd}")
    for host, link, last in ((server, "kecho-s", 1), (client, "kecho-c", 2)):
        host.run("ip", "address", "add", f"198.51.100.{last}/24", "dev", link)
        if Path("/proc/net/if_inet6").exists():
            for prefix in ("2001:db8::", "fe80::"):
                host.run("ip", "address", "add", f"{prefix}{last}/64", "dev", link, "nodad")
        host.run("ip", "link", "set", link, "up")
    return Pair(server, client)


def needs_ipv6() -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")


def add_rule(namespace: Namespace, *rule: str, hook: str = "input") -> None:
    """Has nft apply a rule to every packet that comes in, or goes out (hook: output)."""
    if shutil.which("nft") is None:
        pytest.skip("needs nft, which nftables has")
    try:
        namespace.run("nft", "add", "table", "inet", "kecho")
        chain = f"{{ type filter hook {hook} priority 0; }}"
        namespace.run("nft", "add", "chain", "inet", "kecho", hook, chain)
        namespace.run("nft", "add", "rule", "inet", "kecho", hook, *rule)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"nft cannot do it here: {error.stderr.strip()}")


def matched(namespace: Namespace) -> int:
    """Packets that the rule with a counter has counted."""
    found = re.search(r"counter packets (\d+)", namespace.run("nft", "list", "ruleset"))
    assert found
    return int(found[1])


def assert_same(received: bytes, sent: bytes) -> None:
    assert len(received) == len(sent)
    assert hashlib.sha256(received).hexdigest() == hashlib.sha256(sent).hexdigest()


# ---- another host -----------------------------------------------------------------------------


@pytest.mark.parametrize("address", [Pair.SERVER_V4, Pair.SERVER_V6])
def test_stream_from_another_host_comes_back_whole(
    pair: Pair, start_server: StartServer, dispatch: str, address: str
) -> None:
    if ":" in address:
        needs_ipv6()
    with pair.server:
        server = start_server(host=address, dispatch=dispatch)
    data = random_bytes(4 << 20)
    with pair.connect(address, server.port) as client:
        assert_same(transfer(client, data), data)
    stats = server.stop()
    assert stats.bytes_received == stats.bytes_sent == len(data)
    assert stats.closed["eof"] == 1


def test_link_local_address_is_served(pair: Pair, start_server: StartServer, dispatch: str) -> None:
    needs_ipv6()
    with pair.server:
        server = start_server(host=f"{Pair.SERVER_LINK_LOCAL}%kecho-s", dispatch=dispatch)
    with pair.connect(f"{Pair.SERVER_LINK_LOCAL}%kecho-c", server.port) as client:
        assert echo(client, b"near") == b"near"


@pytest.mark.parametrize("hosts", [("::", "0.0.0.0"), ("0.0.0.0", "::")])
def test_both_wildcards_serve_another_host(
    pair: Pair, start_server: StartServer, dispatch: str, hosts: tuple[str, str]
) -> None:
    needs_ipv6()
    with pair.server:
        server = start_server(host=hosts, dispatch=dispatch)
    assert [address[0] for address in server.addresses] == list(hosts)
    assert len({address[1] for address in server.addresses}) == 1
    with (
        pair.connect(Pair.SERVER_V4, server.port) as over_v4,
        pair.connect(Pair.SERVER_V6, server.port) as over_v6,
    ):
        assert echo(over_v4, b"four") == b"four"
        assert echo(over_v6, b"six") == b"six"


def test_address_of_the_other_host_is_refused(pair: Pair) -> None:
    with pair.client, pytest.raises(ListenError, match=r"^host: .*not an address of this host"):
        open_listeners(ServerConfig(host=Pair.SERVER_V4, port=0), 1)


# ---- a bad line -------------------------------------------------------------------------------


def lose_packets(pair: Pair) -> None:
    """Both ways."""
    for host, link in ((pair.server, "kecho-s"), (pair.client, "kecho-c")):
        # One segment a packet, so that what is lost is a segment and not 64 KiB at once.
        host.run("ip", "link", "set", "dev", link, "gso_max_segs", "1")
        add_rule(host, "numgen", "random", "mod", "100", "<", str(LOSS_PERCENT), "counter", "drop")


@pytest.mark.engines
def test_streams_over_a_lossy_line_come_back_whole(
    pair: Pair, start_server: StartServer, dispatch: str
) -> None:
    lose_packets(pair)
    with pair.server:
        server = start_server(host=Pair.SERVER_V4, dispatch=dispatch)
    payloads = [random_bytes(8 << 20, seed) for seed in range(4)]
    with ExitStack() as stack:
        clients = [stack.enter_context(pair.connect(Pair.SERVER_V4, server.port)) for _ in payloads]
        for received, sent in zip(transfer_all(clients, payloads), payloads, strict=True):
            assert_same(received, sent)
    assert matched(pair.server) > 0
    assert matched(pair.client) > 0
    wait_for(lambda: server.stats().active == 0, "all have ended")
    stats = server.stats()
    assert stats.bytes_received == stats.bytes_sent == sum(map(len, payloads))
    assert stats.closed == closed(eof=len(payloads))
    assert stats.errors.total == 0


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers  # waits for hundreds of retransmissions
@needs_sockmap
def test_what_the_kernel_echoes_by_itself_over_a_lossy_line_comes_back_whole(
    pair: Pair, dispatch: str
) -> None:
    """The server is stopped meanwhile, and no more is under way than the kernel echoes alone."""
    lose_packets(pair)
    arguments = [f"--host={Pair.SERVER_V4}", "--dispatch", dispatch, "--engine=sockmap"]
    size, count, connections = 8 << 10, 24, 40
    payloads = [random_bytes(size * count, seed) for seed in range(connections)]

    def echo_in_pieces(client: socket.socket, payload: bytes) -> bytes:
        pieces = (payload[at : at + size] for at in range(0, len(payload), size))
        return b"".join(echo(client, piece) for piece in pieces)

    with server_process(pair.server, *arguments) as process, ExitStack() as stack:
        process.wait_until_listening()
        clients = [
            stack.enter_context(pair.connect(Pair.SERVER_V4, process.port)) for _ in payloads
        ]
        for client in clients:
            assert echo(client, b"before") == b"before"
        with process.paused(), ThreadPoolExecutor(connections) as threads:
            for received, sent in zip(
                threads.map(echo_in_pieces, clients, payloads), payloads, strict=True
            ):
                assert_same(received, sent)
        for client in clients:
            client.shutdown(socket.SHUT_WR)
            assert receive_until_end(client) == b""
        assert process.stop() == 0
    total = sum(map(len, payloads)) + connections * len(b"before")
    assert f" {total:,} bytes in, {total:,} bytes out, " in process.stderr
    assert f"closed eof={connections}, errors none" in process.stderr
    assert matched(pair.server) > 0
    assert matched(pair.client) > 0


@pytest.mark.engines
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_network_that_is_unreachable_for_a_moment_breaks_no_connection(
    pair: Pair, start_server: StartServer, dispatch: str, size: int
) -> None:
    """ICMP says so, and TCP tries again: RFC 1122, 4.2.3.9. Where the kernel echoes, the larger
    size has the connection handed over."""
    with pair.server:
        server = start_server(host=Pair.SERVER_V4, dispatch=dispatch, max_buffer_memory=1 << 16)
    with pair.connect(Pair.SERVER_V4, server.port) as client:
        assert echo(client, bytes(size)) == bytes(size)
        unreachable = ("reject", "with", "icmp", "type", "host-unreachable")
        add_rule(pair.server, "tcp", "sport", str(server.port), *unreachable, hook="output")
        client.sendall(b"x" * 50)
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.5)
        pair.server.run("nft", "delete", "table", "inet", "kecho")
        assert receive_until_end(client) == b"x" * 50
    wait_for(lambda: server.stats().active == 0, "it has ended")
    assert server.stats().closed == closed(eof=1)
    assert server.stats().errors.total == 0


def test_client_that_vanished_is_given_up(
    pair: Pair, start_server: StartServer, dispatch: str
) -> None:
    # One retransmission instead of fifteen: the kernel gives up within two seconds.
    pair.server.set("net.ipv4.tcp_retries2", 1)
    with pair.server:
        server = start_server(host=Pair.SERVER_V4, dispatch=dispatch)
    with pair.connect(Pair.SERVER_V4, server.port) as client:
        assert echo(client, b"here") == b"here"
        add_rule(pair.client, "drop")
        client.sendall(b"gone")
        wait_for(lambda: server.stats().active == 0, "the end of the connection")
    stats = server.stats()
    assert stats.closed["timed_out"] == stats.closed.total == 1
    assert stats.errors.total == 0


# ---- other settings ---------------------------------------------------------------------------


@contextmanager
def server_process(
    namespace: Namespace, *arguments: str, before: list[str] | None = None
) -> Iterator[ServerProcess]:
    with namespace:
        process = ServerProcess(arguments, before=before or [])
    with process:
        yield process


def established(namespace: Namespace, port: int, count: int, at_least: int) -> int:
    """How many of so many clients connect to a server that does not accept."""
    with namespace, ExitStack() as stack:
        poll = select.poll()
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            poll.register(client, select.POLLOUT)
        wait_for(lambda: len(poll.poll(0)) >= at_least, "as many connections as may wait")
        return len(poll.poll(0))


@pytest.mark.e2e
@pytest.mark.parametrize("backlog", [16, 500])
def test_backlog_is_truncated_to_somaxconn_and_that_is_said(
    namespace: Namespace, dispatch: str, backlog: int
) -> None:
    namespace.set("net.core.somaxconn", 16)
    arguments = ["--backlog", str(backlog), "--dispatch", dispatch, "--threads", "1"]
    with server_process(namespace, *arguments) as process:
        process.wait_until_listening()
        assert "backlog 16," in process.stderr
        warnings = [line for line in process.stderr.splitlines() if "somaxconn" in line]
        assert len(warnings) == (backlog > 16)
        for warning in warnings:
            assert "warning" in warning
            assert "500" in warning
            assert "= 16" in warning
        with process.paused():
            # The kernel lets one more in than the backlog says.
            assert established(namespace, process.port, 40, 17) == 17


# /etc/hosts is another file for the server, in a mount namespace of its own.
HOSTS = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0, "CLONE_NEWNS"
assert libc.mount(None, b"/", None, 0x44000, None) == 0, "MS_PRIVATE | MS_REC"
assert libc.mount({path!r}.encode(), b"/etc/hosts", None, 0x1000, None) == 0, "MS_BIND"
found = {{address[0] for *_, address in socket.getaddrinfo("localhost", 0)}}
assert found == {{"::1", "127.0.0.1"}}, found
"""


@pytest.fixture
def with_both_localhosts(tmp_path: Path) -> list[str]:
    """For `before`: a localhost that stands for ::1 and 127.0.0.1, as on most hosts."""
    if not Path("/etc/hosts").exists():
        pytest.skip("there is no /etc/hosts to put another one over")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    return after(f"exec({HOSTS.format(path=str(tmp_path / 'hosts'))!r})")


@pytest.mark.e2e
def test_localhost_is_served_on_both_its_addresses(
    namespace: Namespace, dispatch: str, with_both_localhosts: list[str]
) -> None:
    needs_ipv6()
    arguments = ["--host", "localhost", "--dispatch", dispatch]
    with server_process(namespace, *arguments, before=with_both_localhosts) as process:
        process.wait_until_listening()
        assert "reachable" not in process.stderr
        with namespace:
            for address in ("127.0.0.1", "::1"):
                with socket.create_connection((address, process.port), DEADLINE_S) as client:
                    assert echo(client, b"hello") == b"hello"


@pytest.mark.e2e
@pytest.mark.parametrize(
    "hosts", [["localhost"], ["127.0.0.1", "localhost"], ["localhost", "127.0.0.1"]]
)
def test_localhost_is_served_without_ipv6(
    namespace: Namespace, dispatch: str, with_both_localhosts: list[str], hosts: list[str]
) -> None:
    needs_ipv6()
    namespace.set("net.ipv6.conf.lo.disable_ipv6", 1)
    arguments = [f"--host={host}" for host in hosts] + ["--dispatch", dispatch]
    with server_process(namespace, *arguments, before=with_both_localhosts) as process:
        process.wait_until_listening()
        with namespace, connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0


@pytest.mark.e2e
def is_reachable(address: str) -> bool:
    """The kernel makes the route to an address of its own a moment after the address."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
        return one.connect_ex((address, 9)) == 0


@pytest.mark.parametrize("dispatch", ["shared", "percpu"])
def test_limits_per_address_take_an_ipv6_network_for_one(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    """A /64: whoever has one address of it has them all."""
    needs_ipv6()
    sources = ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")
    for source in sources:
        inside.run("ip", "address", "add", f"{source}/128", "dev", "lo", "nodad")
    wait_for(lambda: all(map(is_reachable, sources)), "the addresses are there")
    server = start_server(dispatch=dispatch, host=("::",), max_connections_per_ip=1)

    def from_(source: str) -> socket.socket:
        return socket.create_connection(
            ("2001:db8::1", server.port), DEADLINE_S, source_address=(source, 0)
        )

    with from_(sources[0]) as first, from_(sources[2]) as other:
        assert echo(first, b"x") == b"x"
        assert echo(other, b"x") == b"x"
        with pytest.raises(ConnectionResetError), from_(sources[1]) as neighbour:
            neighbour.recv(1)
    assert server.stop().refused["per_address"] == 1


def test_ipv6_address_is_refused_without_ipv6(namespace: Namespace, dispatch: str) -> None:
    needs_ipv6()
    namespace.set("net.ipv6.conf.lo.disable_ipv6", 1)
    with server_process(namespace, "--host=::1", "--dispatch", dispatch) as process:
        assert process.wait() == 1
    assert "--host" in process.stderr
    assert process.stderr.count("\n") == 1


# ---- free ports -------------------------------------------------------------------------------


def occupy(address: str, ports: range, stack: ExitStack) -> None:
    for port in ports:
        stack.enter_context(socket.create_server((address, port)))


def test_free_port_is_one_that_is_free_on_every_address(
    namespace: Namespace, dispatch: str
) -> None:
    namespace.set("net.ipv4.ip_local_port_range", "40000 40031")
    config = ServerConfig(host=("127.0.0.1", "127.0.0.2"), port=0, dispatch=dispatch)
    # The kernel tries the odd ports of the lower half first. Three of these eight are taken, on
    # the second address only: of ten servers most meet one, and none meets sixteen in a row.
    taken = range(40001, 40006, 2)
    with namespace, ExitStack() as stack:
        occupy("127.0.0.2", taken, stack)
        for _ in range(10):
            listeners = open_listeners(config, 2)
            ports = {listener.address[1] for listener in listeners}
            for listener in listeners:
                listener.close()
            assert len(ports) == 1
            assert not ports & set(taken)


def test_no_port_that_is_free_on_every_address_is_an_error(
    namespace: Namespace, dispatch: str, tmp_path: Path
) -> None:
    namespace.set("net.ipv4.ip_local_port_range", "40000 40015")
    config = ServerConfig(
        host=("127.0.0.1", "127.0.0.2"), port=0, uds=tmp_path / "socket", dispatch=dispatch
    )
    with namespace, ExitStack() as stack:
        occupy("127.0.0.2", range(40000, 40016), stack)
        with pytest.raises(ListenError, match=r"^port: .*free on all"):
            open_listeners(config, 2)
    assert not os.path.lexists(tmp_path / "socket")


# ---- the namespaces themselves ----------------------------------------------------------------


def test_namespace_is_left_and_apart_from_ours(namespace: Namespace) -> None:
    ours = Path("/proc/sys/net/core/somaxconn").read_text()
    before = os.readlink("/proc/thread-self/ns/net")
    namespace.set("net.core.somaxconn", 5)
    with namespace:
        assert os.readlink("/proc/thread-self/ns/net") != before
        assert Path("/proc/sys/net/core/somaxconn").read_text() == "5\n"
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert Path("/proc/sys/net/core/somaxconn").read_text() == ours

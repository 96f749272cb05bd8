"""UDP: every datagram comes back as it was, from the address that was asked, and no faster than
was allowed."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import textwrap
import threading
import time
from collections.abc import Callable

import pytest

import kecho
from kecho import ListenError
from support.clients import connect, echo, random_bytes, wait_for
from support.fixture_types import StartServer
from support.server_process import ServerProcess, run_python
from support.udp_clients import (
    all_accounted_for,
    client,
    counted,
    receive_all,
    receive_waiting,
    send_segments,
)

LOOPBACK = "127.0.0.1"
LARGEST = 65507  # 65535 less the headers of IPv4 and UDP


@pytest.fixture
def server(start_server: StartServer, dispatch: str) -> kecho.Server:
    """A server with UDP on every address of this host, under each dispatch."""
    return start_server(dispatch=dispatch, udp=True, host="0.0.0.0")


# ---- every datagram comes back --------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1400, 1472, 1473, 65000, LARGEST])
def test_a_datagram_comes_back_as_it_was(server: kecho.Server, size: int) -> None:
    data = random_bytes(size)
    with client() as one:
        one.sendto(data, (LOOPBACK, server.port))
        assert one.recvfrom(LARGEST + 1) == (data, (LOOPBACK, server.port))


def test_boundaries_hold_in_a_burst_of_all_sizes(server: kecho.Server) -> None:
    chance = random.Random(7)
    sizes = [0, 0, 1, 1, 2, 1400, 1400, 1400, 700, 0, *(chance.randrange(3000) for _ in range(90))]
    sent = [chance.randbytes(size) for size in sizes]
    with client() as one:
        one.connect((LOOPBACK, server.port))
        for datagram in sent:
            one.send(datagram)
        assert receive_all(one, len(sent)) == sent


@pytest.mark.parametrize(
    ("size", "total"),
    [(100, 6400), (100, 6401), (1, 64), (1400, 1400 * 40 + 1), (32000, 65000), (8, 17)],
)
def test_datagrams_that_the_kernel_joined_come_back_apart(
    start_server: StartServer, dispatch: str, size: int, total: int
) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate_repeated=0)
    data = random_bytes(total)
    expected = [data[begin : begin + size] for begin in range(0, total, size)]
    with client() as one:
        for _ in range(3):
            send_segments(one, data, size, (LOOPBACK, server.port))
            assert receive_all(one, len(expected)) == expected
    assert counted(server).received == 3 * len(expected)


def test_more_segments_than_older_kernels_send_at_once_come_back(server: kecho.Server) -> None:
    data = random_bytes(128 * 50)
    with client() as one:
        try:
            send_segments(one, data, 50, (LOOPBACK, server.port))
        except OSError as error:
            pytest.skip(f"this kernel sends fewer than 128 segments at once: {error}")
        assert b"".join(receive_all(one, 128)) == data


def test_joined_datagrams_of_several_clients_are_not_mixed_up(server: kecho.Server) -> None:
    with client() as first, client() as second:
        for _ in range(20):
            for one, letter in ((first, b"a"), (second, b"b")):
                send_segments(one, letter * 250, 100, (LOOPBACK, server.port))
        for one, letter in ((first, b"a"), (second, b"b")):
            assert receive_all(one, 60) == [letter * 100, letter * 100, letter * 50] * 20


def test_many_clients_at_once_get_their_own(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=0)
    failures: list[BaseException] = []

    def talk(number: int) -> None:
        chance = random.Random(number)
        try:
            with client() as one:
                one.connect((LOOPBACK, server.port))
                for _ in range(200):
                    data = chance.randbytes(chance.randrange(2000))
                    one.send(data)
                    assert one.recv(65536) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    wait_for(lambda: counted(server).sent == 1600, "all are counted")


def test_tcp_is_served_beside_it(server: kecho.Server) -> None:
    with connect(("127.0.0.1", server.port)[1]) as stream, client() as one:
        one.sendto(b"datagram", (LOOPBACK, server.port))
        assert echo(stream, b"stream") == b"stream"
        assert one.recv(100) == b"datagram"


# ---- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["127.0.0.1", "127.0.0.5", "127.255.255.254"])
def test_the_address_that_was_asked_answers(server: kecho.Server, asked: str) -> None:
    with client() as one:
        one.sendto(b"?", (asked, server.port))
        assert one.recvfrom(10) == (b"?", (asked, server.port))


def test_ipv6_is_answered_beside_ipv4(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, host=("0.0.0.0", "::"))
    assert [address[0] for address in server.udp_addresses] == ["0.0.0.0", "::"]
    with client(socket.AF_INET6) as six, client() as four:
        for size in (0, 1, LARGEST, 65527):  # IPv6 does not count its own header
            data = random_bytes(size)
            six.sendto(data, ("::1", server.port))
            assert six.recvfrom(65536)[0] == data
        send_segments(six, b"abcde", 2, ("::1", server.port))
        assert receive_all(six, 3) == [b"ab", b"cd", b"e"]
        four.sendto(b"4", ("127.0.0.9", server.port))
        assert four.recvfrom(10) == (b"4", ("127.0.0.9", server.port))


def test_udp_has_the_ports_of_tcp(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, host=("127.0.0.1", "127.0.0.2"))
    assert server.udp_addresses == server.addresses


def test_without_the_option_there_is_no_udp(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch)
    assert server.udp_addresses == ()
    assert server.stats().udp is None
    with client() as one:
        one.connect((LOOPBACK, server.port))
        one.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            one.recv(10)


def test_a_taken_udp_port_is_an_error_that_leaves_nothing_open(dispatch: str) -> None:
    # TCP has to have the port, or it is TCP that is refused: a free one below the ephemeral ones.
    for port in range(20_000, 20_100):
        with contextlib.suppress(OSError), client(source=LOOPBACK, port=port) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server = kecho.Server(port=port, udp=True, dispatch=dispatch, threads=2)
            with pytest.raises(ListenError) as caught:
                server.start()
            if "udp" in caught.value.reason:
                break
    assert f"udp 127.0.0.1:{port} is in use" in caught.value.reason
    assert caught.value.option == "port"


def test_a_free_port_is_looked_for_until_it_is_free_for_both(
    monkeypatch: pytest.MonkeyPatch, dispatch: str
) -> None:
    from kecho.server.sockets import udp

    opened = []

    def open_listeners(*arguments: object) -> object:
        found = original(*arguments)
        opened.append(found[0].address)
        if len(opened) == 1:
            taken.bind(found[0].address)
        return found

    original = udp.open_listeners
    monkeypatch.setattr(udp, "open_listeners", open_listeners)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken,
        kecho.Server(port=0, udp=True, dispatch=dispatch, threads=2) as server,
    ):
        assert len(opened) == 2
        assert server.udp_addresses == (opened[1],) != (opened[0],)


def test_two_servers_share_a_port_when_both_want_to(
    start_server: StartServer, dispatch: str
) -> None:
    first = start_server(dispatch=dispatch, udp=True, reuse_port=True)
    second = start_server(dispatch=dispatch, udp=True, reuse_port=True, port=first.port)
    for _ in range(40):
        with client() as one:
            one.sendto(b"?", (LOOPBACK, first.port))
            assert one.recv(10) == b"?"
    assert counted(first).sent + counted(second).sent == 40
    assert counted(first).sent > 0
    assert counted(second).sent > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_under_percpu_the_worker_of_the_senders_cpu_answers(start_server: StartServer) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    server = start_server(dispatch="percpu", udp=True, threads=len(os.sched_getaffinity(0)))
    run = server._run
    assert run is not None
    assert run._udp is not None
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            before = [one["received"] for one in run._udp.counters()]
            for _ in range(20):  # from new ports: a hash would spread them
                with client() as one:
                    one.sendto(b"?", (LOOPBACK, server.port))
                    assert one.recv(10) == b"?"
            after = [one["received"] for one in run._udp.counters()]
            more = [now - then for now, then in zip(after, before, strict=True)]
            assert more[cpus.index(cpu)] == sum(more) == 20
    finally:
        os.sched_setaffinity(0, set(cpus) | set(run._cpus) - {None})


# ---- the end ----------------------------------------------------------------------------------


def test_a_stop_answers_what_has_been_received(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True)
    with client() as one:
        for number in range(100):
            one.sendto(b"%d" % number, (LOOPBACK, server.port))
        stats = server.stop()
        assert stats.udp is not None
        answered = receive_waiting(one, least=stats.udp.sent)
    assert stats.udp.received + stats.udp.dropped == 100
    assert len(answered) == stats.udp.sent == 100


def test_a_stop_ends_while_datagrams_still_come(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, graceful_timeout=60)
    going = threading.Event()

    def pour() -> None:
        with client() as one:
            one.connect((LOOPBACK, server.port))
            while not going.is_set():
                try:
                    one.send(b"x" * 100)
                except ConnectionRefusedError:  # the server has gone
                    return

    threads = [threading.Thread(target=pour) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: server.stats().udp.received > 1000, "datagrams come")
        began = time.monotonic()
        stats = server.stop()
        assert time.monotonic() - began < 30
        assert stats.udp is not None
        assert all_accounted_for(stats.udp)
    finally:
        going.set()
        for thread in threads:
            thread.join(30)


def test_the_port_is_free_after_a_stop(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True)
    server.stop()
    with client(source=LOOPBACK, port=server.port):
        pass
    server.start()
    server.stop()


def test_an_abort_ends_it(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True)
    server.abort()
    assert server.wait(30)


def test_stats_may_be_read_at_any_time(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True)
    with client() as one:
        one.connect((LOOPBACK, server.port))
        for number in range(300):
            one.send(b"%03d" % number)
            assert one.recv(10) == b"%03d" % number
            server.stats()
    final = server.stop().udp
    assert final is not None
    assert (final.received, final.sent) == (300, 300)
    assert final.bytes_received == final.bytes_sent == 900
    assert final.errors.total == final.refused.total == 0
    assert counted(server) == final


def test_a_full_receive_queue_is_counted(start_server: StartServer) -> None:
    """Its thread is kept from running: the socket is filled before the server takes it over."""
    from kecho import ServerConfig
    from kecho.server import _udp
    from kecho.server.sockets.udp import open_everything

    listeners, (datagrams,) = open_everything(ServerConfig(port=0, udp=True), 1)
    for one in listeners:
        one.close()
    address = datagrams.address
    echo = _udp.Echo(
        [(datagrams.socket.fileno(), 0)],
        worker_count=1,
        own_port=address[1],
        source_port_least=1024,
        rate_per_source=0,
        rate_total=0,
        rate_repeated=0,
        rules=[],
        is_allowed_otherwise=True,
    )
    datagrams.socket.detach()
    with client() as sender:
        for _ in range(5000):
            sender.sendto(bytes(1000), address)
        (before,) = echo.counters()
        assert before["dropped"] > 0
        thread = threading.Thread(target=echo.run_worker, args=(0,))
        thread.start()
        wait_for(
            lambda: (now := echo.counters()[0])["received"] + now["dropped"] == 5000, "all counted"
        )
        echo.stop(1000)
        thread.join(30)
        (after,) = echo.counters()  # the workers are gone: nothing is under way
    assert after["dropped"] == before["dropped"]
    assert after["received"] == after["sent"] == 5000 - before["dropped"]


@pytest.mark.e2e
def test_a_forked_child_holds_no_socket_of_it(dispatch: str) -> None:
    script = """
        import kecho, os, socket, sys
        server = kecho.Server(port=0, udp=True, threads=2, dispatch=sys.argv[1])
        server.start()
        read_fd, write_fd = os.pipe()
        ready_fd, begun_fd = os.pipe()
        if (child := os.fork()) == 0:
            os.close(write_fd)
            os.write(begun_fd, b"x")
            os.read(read_fd, 1)
            os._exit(0)
        os.read(ready_fd, 1)  # it has closed its copies
        with socket.socket(type=socket.SOCK_DGRAM) as one:
            one.settimeout(30)
            one.connect(("127.0.0.1", server.port))
            for _ in range(20):
                one.send(b"?")
                assert one.recv(10) == b"?"
        server.stop()
        with socket.socket(type=socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", server.port))
        os.close(write_fd)
        print(os.waitpid(child, 0)[1])
    """
    finished = run_python(
        "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script), dispatch
    )
    assert (finished.stdout, finished.stderr) == ("0\n", "")


# ---- the command ------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_command_says_where_and_how_many(start_process: Callable[..., ServerProcess]) -> None:
    process = start_process("--udp")
    assert f", udp 127.0.0.1:{process.port} (backlog" in process.stderr
    with client() as one:
        one.sendto(b"hello", (LOOPBACK, process.port))
        assert one.recv(10) == b"hello"
    assert process.stop() == 0
    assert ", udp 1 in, 1 out, 0 dropped, refused none, errors none" in process.stderr

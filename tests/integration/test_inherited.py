"""--fd: listening sockets that somebody else has opened, and may share."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kecho import ListenError, OptionError, ServerConfig
from support.clients import (
    connect,
    connected_to,
    echo,
    plenty,
    receive_until_end,
    receive_until_reset,
    send_until_blocked,
    transfer,
    wait_for,
)
from support.fixture_types import StartServer
from support.server_process import ServerProcess, after, run_command


@pytest.fixture(params=["tcp", "tcp6", "unix", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    if request.param == "tcp":
        one = socket.create_server(("127.0.0.1", 0))
    elif request.param == "tcp6":
        one = socket.create_server(("::1", 0), family=socket.AF_INET6)
    else:
        one = socket.socket(socket.AF_UNIX)
        one.bind(str(tmp_path / "s") if request.param == "unix" else f"\0kecho-{os.getpid()}")
        one.listen()
    with one:
        yield one


def test_an_inherited_socket_is_served_and_left_listening(
    start_server: StartServer, listening: socket.socket, dispatch: str
) -> None:
    server = start_server(fd=listening.fileno(), dispatch=dispatch)
    for _ in range(2):
        with connected_to(listening) as client:
            assert transfer(client, b"hello" * 1000) == b"hello" * 1000
        server.stop()
        # It is still the caller's, and clients wait there.
        with connected_to(listening) as waiting:
            waiting.sendall(b"later")
            server.start()
            assert waiting.recv(100) == b"later"


def test_its_address_is_told(start_server: StartServer, listening: socket.socket) -> None:
    server = start_server(fd=[listening.fileno()])
    address = listening.getsockname()
    expected = "@" + os.fsdecode(address[1:]) if isinstance(address, bytes) else address
    assert server.addresses == (expected,)


def test_options_of_accepted_connections_are_those_of_a_listener_of_its_own(
    start_server: StartServer, tcp: socket.socket
) -> None:
    assert not tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    start_server(fd=tcp.fileno())
    assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)


SO_TIMESTAMPING, IP_RECVERR, IPV6_RECVERR = 37, 11, 25
# Software stamps of each segment when it is sent, acknowledged and scheduled: timestamping.rst.
STAMPS_OF_WHAT_IS_SENT = 1 << 1 | 1 << 4 | 1 << 8 | 1 << 9

# What a foreign listener may have set, and its connections inherit.
ODD_OPTIONS: dict[str, tuple[int, int, int | bytes]] = {
    "linger-0": (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
    "linger-60": (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60)),
    "low-water": (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 100),
    "cork": (socket.IPPROTO_TCP, socket.TCP_CORK, 1),
    "no-fin-wait": (socket.IPPROTO_TCP, socket.TCP_LINGER2, -1),
    "stamps": (socket.SOL_SOCKET, SO_TIMESTAMPING, STAMPS_OF_WHAT_IS_SENT),
    "errors": (socket.IPPROTO_IP, IP_RECVERR, 1),
    "errors-v6": (socket.IPPROTO_IPV6, IPV6_RECVERR, 1),
}


@pytest.mark.parametrize("name", ODD_OPTIONS)
def test_options_of_an_inherited_listener_that_would_spoil_echoes_are_put_in_order(
    start_server: StartServer, name: str
) -> None:
    family = socket.AF_INET6 if name == "errors-v6" else socket.AF_INET
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with (
        socket.create_server((host, 0), family=family) as odd,
        socket.create_server((host, 0), family=family) as plain,
    ):
        odd.setsockopt(*ODD_OPTIONS[name])
        start_server(fd=[odd.fileno(), plain.fileno()])
        for level, option, _ in ODD_OPTIONS.values():
            if level != socket.IPPROTO_IPV6 or family == socket.AF_INET6:
                values = [one.getsockopt(level, option) for one in (odd, plain)]
                assert values[0] == values[1], option


def test_a_low_water_mark_of_an_inherited_listener_holds_back_no_message(
    start_server: StartServer, tcp: socket.socket
) -> None:
    tcp.setsockopt(*ODD_OPTIONS["low-water"])
    start_server(fd=tcp.fileno())
    with connected_to(tcp) as client:
        for _ in range(3):  # the first may be read before anybody waits for it
            assert echo(client, b"x") == b"x"


def test_no_reset_follows_from_a_listener_that_lingers_for_no_time(
    start_server: StartServer, tcp: socket.socket
) -> None:
    tcp.setsockopt(*ODD_OPTIONS["linger-0"])
    server = start_server(fd=tcp.fileno())
    with connected_to(tcp) as client:
        client.sendall(bytes(200_000))
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: server.stats().bytes_sent == 200_000, "all is on its way")
        assert receive_until_end(client) == bytes(200_000)


def test_stamps_of_what_is_sent_do_not_fill_the_receive_buffer(
    start_server: StartServer, tcp: socket.socket
) -> None:
    tcp.setsockopt(*ODD_OPTIONS["stamps"])
    start_server(fd=tcp.fileno())
    with connected_to(tcp) as client:
        for _ in range(3000):
            assert echo(client, b"x") == b"x"
        assert len(transfer(client, bytes(10_000_000))) == 10_000_000


def test_a_multipath_socket_is_served(start_server: StartServer, dispatch: str) -> None:
    try:
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error.strerror}")
    with one:
        one.setsockopt(*ODD_OPTIONS["low-water"])
        one.bind(("127.0.0.1", 0))
        one.listen()
        server = start_server(fd=one.fileno(), dispatch=dispatch, write_timeout=5)
        for protocol in (0, socket.IPPROTO_MPTCP):
            with socket.socket(one.family, socket.SOCK_STREAM, protocol) as client:
                client.settimeout(30)
                client.connect(one.getsockname())
                assert transfer(client, b"hello" * 1000) == b"hello" * 1000
        server.stop()


def test_an_address_may_stand_beside_it(start_server: StartServer, tcp: socket.socket) -> None:
    server = start_server(fd=tcp.fileno(), host="127.0.0.2", port=0)
    assert len(server.addresses) == 2
    for address in server.addresses:
        with socket.create_connection(address[:2], timeout=30) as client:
            assert echo(client, b"hello") == b"hello"


def test_without_an_address_it_stands_alone(tcp: socket.socket) -> None:
    assert ServerConfig.from_options({"fd": tcp.fileno()}).host == ()
    assert ServerConfig.from_options({"fd": ()}).host == ("127.0.0.1",)
    with pytest.raises(OptionError, match="descriptor"):
        ServerConfig(host=())


def test_a_group_with_a_socket_for_each_worker_is_dealt_out(start_server: StartServer) -> None:
    sockets = [socket.create_server(("127.0.0.1", 0), reuse_port=True)]
    sockets.append(socket.create_server(sockets[0].getsockname(), reuse_port=True))
    try:
        fds = [one.fileno() for one in sockets]
        server = start_server(fd=fds, dispatch="percpu", threads=2)
        assert len(server.addresses) == 1
        clients = [connected_to(sockets[0]) for _ in range(40)]
        for client in clients:
            assert echo(client, b"hello") == b"hello"
            client.close()
        # By the kernel's hash: that one gets none of 40 happens once in 2**39.
        assert all(worker.accepted for worker in server.stats().workers)
    finally:
        for one in sockets:
            one.close()


def test_what_cannot_be_served_is_refused_and_nothing_is_left_open(
    start_server: StartServer, tcp: socket.socket, tmp_path: Path
) -> None:
    with (
        socket.socket() as silent,
        socket.socket(type=socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets,
        open(tmp_path / "file", "w") as file,
        socket.create_connection(tcp.getsockname()) as connection,
    ):
        packets.bind(str(tmp_path / "s"))
        packets.listen()
        free = os.dup(0)
        os.close(free)
        for fd, reason in (
            (silent.fileno(), "does not listen"),
            (connection.fileno(), "does not listen"),
            (datagram.fileno(), "is neither a TCP nor a Unix stream socket"),
            (packets.fileno(), "is neither a TCP nor a Unix stream socket"),
            (file.fileno(), "is not a socket"),
            (free, "is not open"),
        ):
            before = os.listdir("/proc/self/fd")
            with pytest.raises(ListenError, match=f"fd: descriptor {fd} {reason}") as refused:
                start_server(fd=[tcp.fileno(), fd])
            assert refused.value.option == "fd"
            assert refused.value.errno
            assert os.listdir("/proc/self/fd") == before


def test_two_servers_share_it_and_the_first_to_stop_does_not_end_it(
    start_server: StartServer, listening: socket.socket, dispatch: str
) -> None:
    first = start_server(fd=listening.fileno(), dispatch=dispatch)
    second = start_server(fd=listening.fileno(), dispatch=dispatch)
    for server in (first, second):
        for _ in range(20):
            with connected_to(listening) as client:
                assert echo(client, b"hello") == b"hello"
        server.stop()
        server.start()
    first.abort()
    first.wait()
    for _ in range(20):
        with connected_to(listening) as client:
            assert echo(client, b"hello") == b"hello"


@pytest.mark.e2e
def test_a_holder_that_hangs_keeps_no_client_from_the_other(
    tcp: socket.socket, dispatch: str
) -> None:
    """The wake-up of a client is not spent on a process that cannot accept it."""
    arguments = ["--fd", str(tcp.fileno()), "--dispatch", dispatch, "--threads=2"]
    fds = [tcp.fileno()]
    with (
        ServerProcess(arguments, pass_fds=fds) as hanging,
        ServerProcess(arguments, pass_fds=fds) as serving,
    ):
        hanging.wait_until_listening()
        serving.wait_until_listening()
        with hanging.paused():
            for _ in range(50):
                with connected_to(tcp) as client:
                    assert echo(client, b"hello") == b"hello"
        assert hanging.stop() == serving.stop() == 0


@pytest.mark.e2e
def test_a_server_that_drains_is_no_longer_told_of_clients(
    tcp: socket.socket, dispatch: str
) -> None:
    """Its copy of the socket is closed, but that ends no registration while others have it."""
    arguments = ["--fd", str(tcp.fileno()), "--dispatch", dispatch, "--graceful-timeout=60"]
    with ServerProcess(arguments, pass_fds=[tcp.fileno()]) as process:
        process.wait_until_listening()
        inode = os.fstat(tcp.fileno()).st_ino
        assert inode in watched_inodes(process.pid)
        with connected_to(tcp) as client:
            send_until_blocked(client, plenty())
            process.send(signal.SIGTERM)
            process.wait_until_said("draining")
            wait_for(lambda: inode not in watched_inodes(process.pid), "it is watched no more")
            assert process.process.poll() is None
            process.send(signal.SIGTERM)
            assert process.wait() == 0


def watched_inodes(pid: int) -> set[int]:
    """Of every file that an epoll instance of a process watches: proc_pid_fdinfo(5)."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = path.read_text()
        except FileNotFoundError:  # closed meanwhile
            continue
        found.update(int(number, 16) for number in re.findall(r"tfd:.* ino:(\w+)", text))
    return found


@pytest.mark.e2e
def test_the_command_keeps_no_copy_that_clients_could_wait_at(tcp: socket.socket) -> None:
    fd = tcp.fileno()
    with ServerProcess(["--fd", str(fd)], pass_fds=[fd]) as process:
        process.wait_until_listening()
        inode = os.readlink(f"/proc/self/fd/{fd}")
        held = [
            path.name
            for path in Path(f"/proc/{process.pid}/fd").iterdir()
            if os.readlink(path) == inode
        ]
        assert len(held) == 1
        assert process.stop() == 0


@pytest.mark.e2e
def test_clients_whom_a_stop_leaves_to_nobody_are_counted_in_a_warning(dispatch: str) -> None:
    """The last holder of a socket cannot know that it is."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port, fd = one.getsockname()[1], one.fileno()
        arguments = ["--dispatch", dispatch, "--threads=2", "--max-connections=1", "--fd", str(fd)]
        process = ServerProcess(arguments, pass_fds=[fd])
        with process:
            process.wait_until_listening()
            one.close()
            with contextlib.ExitStack() as stack:
                inside, *waiting = (stack.enter_context(connect(port)) for _ in range(6))
                assert echo(inside, b"inside") == b"inside"
                assert process.stop() == 0
                assert receive_until_end(inside) == b""
                assert [receive_until_reset(client) for client in waiting] == [b""] * 5
    assert process.stderr.count("warning: 5 clients wait to be accepted at inherited sockets") == 1


@pytest.mark.e2e
def test_standard_input_may_be_the_socket(tcp: socket.socket) -> None:
    """As inetd(8) has it with "wait"."""
    before = after(f"os.dup2({tcp.fileno()}, 0)")
    with ServerProcess(["--fd=0"], before=before, pass_fds=[tcp.fileno()]) as process:
        process.wait_until_listening()
        with connected_to(tcp) as client:
            assert echo(client, b"hello") == b"hello"
        assert os.readlink(f"/proc/{process.pid}/fd/0") == "/dev/null"
        assert process.stop() == 0


@pytest.mark.e2e
def test_a_descriptor_that_cannot_be_served_is_one_line_and_status_1() -> None:
    finished = run_command("--fd=77")
    assert finished.returncode == 1
    assert finished.stderr == "kecho: error: --fd: descriptor 77 is not open\n"


@pytest.mark.e2e
def test_the_backlog_that_is_told_is_the_sockets_own(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=5) as short,
        socket.create_server(("127.0.0.1", 0), backlog=33) as long,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(tmp_path / "s"))
        unix.listen(7)
        for sockets, told in (
            ([short], "(backlog 5, dispatch"),
            ([short, long], "(backlog 5 to 33, dispatch"),
            ([unix], "(dispatch"),
        ):
            fds = [one.fileno() for one in sockets]
            arguments = [*(f"--fd={fd}" for fd in fds), "--backlog=1000000"]
            with ServerProcess(arguments, pass_fds=fds) as process:
                process.wait_until_listening()
                assert told in process.stderr
                assert "somaxconn" not in process.stderr  # nothing of ours is truncated
                assert process.stop() == 0

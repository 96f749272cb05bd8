"""--fd and socket activation: listening sockets that somebody else has opened, and may share."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kecho
from clients import (
    connect,
    echo,
    receive_until_end,
    receive_until_reset,
    send_until_blocked,
    transfer,
    wait_for,
)
from kecho import ListenError, OptionError, ServerConfig, systemd
from processes import ServerProcess, after, run_command

StartServer = Callable[..., kecho.Server]


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


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


def connected_to(one: socket.socket) -> socket.socket:
    client = socket.socket(one.family)
    client.settimeout(30)
    client.connect(one.getsockname())
    return client


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


def test_a_multipath_socket_is_served(start_server: StartServer, dispatch: str) -> None:
    try:
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error.strerror}")
    with one:
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
            send_until_blocked(client, bytes(50_000_000))
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


# ---- sd_listen_fds(3) --------------------------------------------------------------------------

ACTIVATED = "os.environ.update(LISTEN_PID=str({pid}), LISTEN_FDS='{count}', LISTEN_FDNAMES='a:b')"


def activated(
    sockets: list[socket.socket],
    *arguments: str,
    pid: str = "os.getpid()",
    count: int | None = None,
) -> ServerProcess:
    """A server with these sockets as descriptors 3 and so on."""
    # By way of high numbers, so that none is overwritten before it is copied.
    moves = [f"os.dup2({one.fileno()}, {100 + i})" for i, one in enumerate(sockets)]
    moves += [f"os.dup2({100 + i}, {3 + i})" for i in range(len(sockets))]
    moves.append(ACTIVATED.format(pid=pid, count=len(sockets) if count is None else count))
    # ServerProcess adds --port otherwise, which would open an address beside the sockets.
    run = f"sys.argv[2:] = ['-m', 'kecho', *{list(arguments)!r}]"
    return ServerProcess(
        ["--port=0"],
        before=after("; ".join([*moves, run])),
        pass_fds=[one.fileno() for one in sockets],
    )


@pytest.mark.e2e
def test_sockets_of_the_service_manager_are_served(tcp: socket.socket, dispatch: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        activated([tcp, other], "--dispatch", dispatch) as process,
    ):
        process.wait_until_listening()
        for one in (tcp, other):
            assert f":{one.getsockname()[1]}" in process.stderr
            with connected_to(one) as client:
                assert echo(client, b"hello") == b"hello"
        assert process.stderr.count("tcp ") == 2
        assert process.stop() == 0


@pytest.mark.e2e
def test_sockets_meant_for_another_process_are_ignored(tcp: socket.socket) -> None:
    with activated([tcp], "--port=0", pid="os.getppid()") as process:
        process.wait_until_listening()
        assert process.port != tcp.getsockname()[1]
        assert process.stop() == 0


@pytest.mark.e2e
def test_a_flag_wins_over_the_service_manager(tcp: socket.socket) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        activated([tcp, other], "--fd=4") as process,
    ):
        process.wait_until_listening()
        assert process.port == other.getsockname()[1]
        assert process.stop() == 0


@pytest.mark.e2e
def test_a_descriptor_that_the_service_manager_did_not_open_is_named(tcp: socket.socket) -> None:
    with activated([tcp], count=200) as process:
        assert process.wait() == 1
    assert "LISTEN_FDS: descriptor " in process.stderr
    assert process.stderr.count("\n") == 1


def test_the_environment_is_taken_and_removed() -> None:
    mine = str(os.getpid())
    rest = {"LISTEN_FDNAMES": "x", "LISTEN_PIDFDID": "1", "HOME": "/"}
    for pid, count, expected in (
        (mine, "2", (1003, 1004)),
        (mine, "0", ()),
        ("1", "2", ()),
        ("", "2", ()),
        ("x", "2", ()),
    ):
        environment = {"LISTEN_PID": pid, "LISTEN_FDS": count, **rest}
        first, systemd._FIRST_FD = systemd._FIRST_FD, 1003
        try:
            assert systemd.take_listen_fds(environment) == expected
        finally:
            systemd._FIRST_FD = first
        assert environment == {"HOME": "/"}
    assert systemd.take_listen_fds({}) == ()


@pytest.mark.parametrize("count", ["", "x", "-1", "1.5", "99999999", "٣", "65536"])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(ValueError, match="number of descriptors"):
        systemd.take_listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


@pytest.mark.e2e
def test_a_count_that_is_none_is_wrong_usage(tcp: socket.socket) -> None:
    with activated([tcp], count=-1) as process:
        assert process.wait() == 2
    assert process.stderr.startswith("kecho: error: LISTEN_FDS: ")


# ---- sd_notify(3) ------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What goes into NOTIFY_SOCKET, and the socket that gets what is told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.settimeout(30)
        if request.param == "path":
            one.bind(str(tmp_path / "notify"))
            yield str(tmp_path / "notify"), one
        else:
            name = f"kecho-notify-{os.getpid()}"
            one.bind("\0" + name)
            yield "@" + name, one


@pytest.mark.e2e
def test_the_service_manager_is_told_of_start_life_and_stop(
    manager: tuple[str, socket.socket], dispatch: str
) -> None:
    address, told = manager
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
    with ServerProcess(["--dispatch", dispatch], environment) as process:
        assert told.recv(100) == b"READY=1"
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert [told.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert process.stop() == 0
    rest = list(iter(lambda: told.recv(100), b"STOPPING=1"))
    assert set(rest) <= {b"WATCHDOG=1"}


@pytest.mark.e2e
def test_a_main_thread_that_hangs_is_not_alive_to_the_service_manager(
    manager: tuple[str, socket.socket],
) -> None:
    address, told = manager
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}
    with ServerProcess([], environment) as process:
        assert told.recv(100) == b"READY=1"
        process.wait_until_listening()
        with process.paused():
            drain(told)
            told.settimeout(0.5)
            with pytest.raises(TimeoutError):
                told.recv(100)
        told.settimeout(30)
        assert told.recv(100) == b"WATCHDOG=1"
        assert process.stop() == 0


def drain(told: socket.socket) -> None:
    """Throws away what has been told so far."""
    told.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while told.recv(100):
            pass


@pytest.mark.e2e
def test_a_watchdog_of_another_process_is_not_fed(manager: tuple[str, socket.socket]) -> None:
    address, told = manager
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with ServerProcess([], environment) as process:
        process.wait_until_listening()
        assert told.recv(100) == b"READY=1"
        assert process.stop() == 0
    assert told.recv(100) == b"STOPPING=1"


@pytest.mark.e2e
def test_a_manager_that_goes_away_or_does_not_read_stops_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000"}
        with ServerProcess([], environment) as process:
            process.wait_until_listening()  # and its queue of a few datagrams is full at once
            with connect(process.port) as client:
                assert echo(client, b"hello") == b"hello"
                told.close()
                assert echo(client, b"again") == b"again"
            assert process.stop() == 0


@pytest.mark.e2e
@pytest.mark.parametrize("address", ["/nowhere/notify", "@kecho-nobody", "vsock:2:1", "relative"])
def test_a_manager_that_cannot_be_reached_is_said_in_one_line(address: str) -> None:
    with ServerProcess([], {"NOTIFY_SOCKET": address}) as process:
        process.wait_until_listening()
        assert process.stop() == 0
    warnings = [line for line in process.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "NOTIFY_SOCKET" in warnings[0]


@pytest.mark.e2e
def test_a_start_that_fails_is_told_as_a_stop_and_never_as_ready(
    manager: tuple[str, socket.socket], tcp: socket.socket
) -> None:
    address, told = manager
    arguments = [f"--port={tcp.getsockname()[1]}"]
    with ServerProcess(arguments, {"NOTIFY_SOCKET": address}) as process:
        assert process.wait() == 1
    assert told.recv(100) == b"STOPPING=1"


def test_odd_watchdog_times_are_none() -> None:
    for text in ("", "0", "x", "-5", "1e3", "9" * 30, "٣"):
        assert systemd._watchdog_interval_s({"WATCHDOG_USEC": text}) is None
    assert systemd._watchdog_interval_s({"WATCHDOG_USEC": "3000000"}) == 1.5


def test_nobody_is_told_when_nobody_asked() -> None:
    environment = {"WATCHDOG_USEC": "1000"}
    notifier = systemd.Notifier(environment)
    assert notifier.watchdog_interval_s is None
    notifier.ready()
    notifier.close()

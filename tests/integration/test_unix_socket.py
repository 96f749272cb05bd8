"""Unix stream sockets: their file, and that every byte comes back through them, too."""

from __future__ import annotations

import errno
import os
import queue
import re
import signal
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import kecho
from kecho.server.confinement.sandbox import IS_SANITIZED
from kecho.system.sysctl import somaxconn
from support.clients import (
    DEADLINE_S,
    connect,
    connected,
    echo,
    random_bytes,
    receive_exactly,
    receive_until_end,
    reset,
    send_until_blocked,
    transfer,
    transfer_all,
)
from support.fixture_types import StartProcess, StartServer
from support.privileges import is_root
from support.server_process import ServerProcess, after, assert_refused, run_command


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def unix_server(start_server: StartServer, dispatch: str, path: str) -> kecho.Server:
    return start_server(uds=path, dispatch=dispatch)


# ---- bytes --------------------------------------------------------------------------------------


def test_every_byte_comes_back(unix_server: kecho.Server) -> None:
    data = random_bytes(8 << 20)
    with connect(unix_server) as client:
        assert transfer(client, data) == data


def test_small_messages_come_back_one_by_one(unix_server: kecho.Server) -> None:
    with connect(unix_server) as client:
        for number in range(500):
            message = b"%d" % number
            assert echo(client, message) == message


def test_messages_that_wait_in_the_socket_come_back_in_order(unix_server: kecho.Server) -> None:
    # A recv on a Unix socket ends where a sender's buffer ends: short, with more behind it.
    messages = [random_bytes(1 + size % 700, seed=size) for size in range(100)]
    with connect(unix_server) as client:
        for message in messages:
            client.sendall(message)
        everything = b"".join(messages)
        assert receive_exactly(client, len(everything)) == everything


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 4 * 65536, 4 * 65536 + 1])
def test_sizes_around_the_servers_buffer_come_back(unix_server: kecho.Server, size: int) -> None:
    data = random_bytes(size)
    with connect(unix_server) as client:
        assert transfer(client, data) == data


def test_the_end_right_behind_the_data_loses_nothing(unix_server: kecho.Server) -> None:
    for number in range(100):
        with connect(unix_server) as client:
            client.sendall(b"%d" % number)
            client.shutdown(socket.SHUT_WR)
            assert receive_until_end(client) == b"%d" % number


def test_a_client_that_never_reads_is_held_back_and_then_gets_everything(
    unix_server: kecho.Server,
) -> None:
    data = random_bytes(16 << 20)
    with connect(unix_server) as client, connect(unix_server) as other:
        sent = send_until_blocked(client, data)
        assert unix_server.stats().backpressure > 0
        assert echo(other, b"hello") == b"hello"
        assert receive_exactly(client, sent) == data[:sent]
        assert echo(client, b"hello") == b"hello"


def test_many_clients_at_once(unix_server: kecho.Server) -> None:
    payloads = [random_bytes(200_000 + index, seed=index) for index in range(50)]
    with connected(unix_server, len(payloads)) as clients:
        assert transfer_all(clients, payloads) == payloads
    stats = unix_server.stop()
    assert stats.accepted == len(payloads)
    assert stats.bytes_sent == stats.bytes_received == sum(map(len, payloads))


def test_clients_that_leave_without_reading_do_not_disturb_others(
    unix_server: kecho.Server,
) -> None:
    with connect(unix_server) as other:
        for _ in range(100):
            client = connect(unix_server)
            client.sendall(b"hello")
            reset(client)
            assert echo(other, b"hello") == b"hello"
        assert unix_server.stop().closed.total == 101


def test_a_stop_gives_back_what_was_received(unix_server: kecho.Server) -> None:
    data = random_bytes(16 << 20)
    with connect(unix_server) as client, connect(unix_server) as idle:
        sent = send_until_blocked(client, data)
        unix_server.request_stop()
        assert receive_until_end(client) == data[:sent]
        assert receive_until_end(idle) == b""
    stats = unix_server.stop()
    assert stats.closed["drained"] == 2
    assert stats.bytes_sent == sent


def test_an_idle_client_is_closed(start_server: StartServer, dispatch: str, path: str) -> None:
    server = start_server(uds=path, dispatch=dispatch, idle_timeout=0.05)
    with connect(path) as client:
        assert receive_until_end(client) == b""
    assert server.stop().closed["idle"] == 1


# ---- addresses ----------------------------------------------------------------------------------


def test_the_address_is_the_path_and_there_is_no_port(unix_server: kecho.Server, path: str) -> None:
    assert unix_server.addresses == (path,)
    with pytest.raises(RuntimeError, match="port"):
        _ = unix_server.port


def test_unix_and_tcp_side_by_side(start_server: StartServer, dispatch: str, path: str) -> None:
    server = start_server(uds=path, port=0, dispatch=dispatch)
    assert set(server.addresses) == {path, ("127.0.0.1", server.port)}
    with connect(path) as unix, connect(server.port) as tcp:
        assert echo(unix, b"unix") == b"unix"
        assert echo(tcp, b"tcp") == b"tcp"


def test_the_longest_path_is_served_and_a_longer_one_refused(
    start_server: StartServer, dispatch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    longest = "x" * 107
    start_server(uds=longest, dispatch=dispatch)
    with connect(longest) as client:
        assert echo(client, b"hello") == b"hello"
    with pytest.raises(kecho.OptionError, match=r"uds.*107"):
        kecho.Server(uds=longest + "x")


def test_a_path_that_is_not_utf8(start_server: StartServer, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe\n"
    start_server(uds=path)
    with connect(os.fsdecode(path)) as client:
        assert echo(client, b"hello") == b"hello"


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_a_path_may_be_given_in_every_form(
    start_server: StartServer, path: str, kind: Callable[[str], object]
) -> None:
    assert start_server(uds=kind(path)).addresses == (path,)


# ---- the file -----------------------------------------------------------------------------------


def test_stop_removes_the_file(unix_server: kecho.Server, path: str) -> None:
    assert stat.S_ISSOCK(os.lstat(path).st_mode)
    unix_server.stop()
    assert not os.path.lexists(path)


def test_stop_removes_the_file_of_a_relative_path_after_chdir(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    server = start_server(uds="socket")
    monkeypatch.chdir(tmp_path / "elsewhere")
    server.stop()
    assert not (tmp_path / "socket").exists()


def test_stop_leaves_another_servers_file_alone(
    start_server: StartServer, dispatch: str, path: str
) -> None:
    first = start_server(uds=path, dispatch=dispatch)
    os.unlink(path)
    start_server(uds=path, dispatch=dispatch)
    first.stop()
    with connect(path) as client:
        assert echo(client, b"hello") == b"hello"


def test_a_file_that_is_gone_does_not_trouble_the_stop(
    unix_server: kecho.Server, path: str
) -> None:
    os.unlink(path)
    assert unix_server.stop().accepted == 0


def test_a_server_can_be_started_again_on_its_path(unix_server: kecho.Server, path: str) -> None:
    unix_server.stop()
    with unix_server, connect(path) as client:
        assert echo(client, b"hello") == b"hello"


def test_a_stale_file_is_taken_over(start_server: StartServer, dispatch: str, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(path)
        gone.listen()
    assert os.path.lexists(path)
    start_server(uds=path, dispatch=dispatch)
    with connect(path) as client:
        assert echo(client, b"hello") == b"hello"


def test_a_path_that_another_server_holds_is_refused(
    unix_server: kecho.Server, dispatch: str, path: str
) -> None:
    with pytest.raises(kecho.ListenError, match="in use") as raised:
        kecho.Server(uds=path, dispatch=dispatch).start()
    assert (raised.value.option, raised.value.errno) == ("uds", errno.EADDRINUSE)
    with connect(path) as client:
        assert echo(client, b"hello") == b"hello"


def test_a_path_whose_server_is_busy_is_not_taken_for_stale(
    start_server: StartServer, dispatch: str, path: str
) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        with connect(path):  # the one that may wait
            with pytest.raises(kecho.ListenError, match="in use"):
                start_server(uds=path, dispatch=dispatch)
            assert os.path.lexists(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file"])
def test_what_is_not_a_socket_is_refused_and_kept(
    start_server: StartServer, tmp_path: Path, path: str, kind: str
) -> None:
    if kind == "directory":
        os.mkdir(path)
    elif kind == "file":
        Path(path).write_text("mine")
    else:
        (tmp_path / "file").write_text("mine")
        os.symlink(tmp_path / "file", path)
    with pytest.raises(kecho.ListenError, match="not a socket") as raised:
        start_server(uds=path)
    assert raised.value.option == "uds"
    assert Path(path).is_dir() or Path(path).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "number"),
    [("missing/socket", errno.ENOENT), ("file/socket", errno.ENOTDIR)],
)
def test_a_directory_that_cannot_be_used_is_refused(
    start_server: StartServer, dispatch: str, tmp_path: Path, name: str, number: int
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kecho.ListenError, match="uds") as raised:
        start_server(uds=tmp_path / name, dispatch=dispatch)
    assert (raised.value.option, raised.value.errno) == ("uds", number)


def test_a_refused_port_removes_the_file_again(
    start_server: StartServer, dispatch: str, path: str
) -> None:
    held = start_server()
    with pytest.raises(kecho.ListenError, match="port"):
        start_server(uds=path, port=held.port, dispatch=dispatch)
    assert not os.path.lexists(path)


def test_of_servers_that_start_at_once_on_a_stale_path_one_has_it(dispatch: str, path: str) -> None:
    for _ in range(40):
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(path)
            gone.listen()
        servers = [kecho.Server(uds=path, dispatch=dispatch, threads=1) for _ in range(4)]
        together = threading.Barrier(len(servers))
        refusals: queue.Queue[str] = queue.Queue()

        def start(
            server: kecho.Server,
            together: threading.Barrier = together,
            refusals: queue.Queue[str] = refusals,
        ) -> None:
            together.wait(DEADLINE_S)
            try:
                server.start()
            except kecho.ListenError as error:
                refusals.put(str(error))

        threads = [threading.Thread(target=start, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        started = [server for server in servers if server.is_running]
        try:
            assert len(started) == 1
            assert all("in use" in refusals.get() for _ in range(3))
            with connect(path) as client:
                assert echo(client, b"hello") == b"hello"
        finally:
            for server in started:
                server.stop()
        assert not os.path.lexists(path)


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_start_line_names_the_path(
    start_process: StartProcess, dispatch: str, path: str
) -> None:
    process = start_process("--uds", path, "--dispatch", dispatch)
    assert f"unix {path}" in process.stderr
    assert "tcp" not in process.stderr
    assert "other hosts" not in process.stderr
    with connect(path) as client:
        assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
    assert not os.path.lexists(path)


@pytest.mark.e2e
def test_the_command_serves_unix_beside_tcp(start_process: StartProcess, path: str) -> None:
    process = start_process("--port=0", KECHO_UDS=path)
    for address in (path, process.port):
        with connect(address) as client:
            assert echo(client, b"hello") == b"hello"


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_two_signals_still_remove_the_file(
    start_process: StartProcess, dispatch: str, path: str, number: signal.Signals
) -> None:
    process = start_process("--uds", path, "--dispatch", dispatch, "--graceful-timeout=1000000")
    with connect(path) as client:
        send_until_blocked(client, random_bytes(16 << 20))
        process.send(number)
        process.wait_until_said("draining")
        process.send(number)
        assert process.wait() == 0
    assert not os.path.lexists(path)


@pytest.mark.e2e
def test_the_file_of_a_killed_process_is_taken_over(
    start_process: StartProcess, dispatch: str, path: str
) -> None:
    killed = start_process("--uds", path, "--dispatch", dispatch)
    killed.send(signal.SIGKILL)
    killed.wait()
    assert os.path.lexists(path)
    start_process("--uds", path, "--dispatch", dispatch)
    with connect(path) as client:
        assert echo(client, b"hello") == b"hello"


@pytest.mark.e2e
def test_a_path_in_use_is_one_line(unix_server: kecho.Server, path: str) -> None:
    finished = run_command(KECHO_UDS=path)
    assert finished.returncode == 1
    assert re.fullmatch(r"kecho: error: KECHO_UDS: .*in use.*\n", finished.stderr)


@pytest.mark.e2e
def test_the_umask_decides_who_may_connect(path: str) -> None:
    with ServerProcess(["--uds", path], before=after("os.umask(0o077)")) as process:
        process.wait_until_listening()
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o700


@pytest.mark.e2e
def test_a_paused_server_takes_as_many_clients_as_its_backlog(
    start_process: StartProcess, path: str
) -> None:
    backlog = min(5, somaxconn())
    process = start_process("--uds", path, "--backlog", str(backlog))
    waiting: list[socket.socket] = []
    with process.paused():
        for _ in range(backlog + 1):  # unix(7): one more than the backlog
            waiting.append(connect(path))
        with socket.socket(socket.AF_UNIX) as late:
            late.setblocking(False)
            assert late.connect_ex(path) == errno.EAGAIN
    for client in waiting:
        with client:
            assert echo(client, b"hello") == b"hello"


# ---- abstract sockets, permissions and owners ---------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("sandbox", [*([] if IS_SANITIZED else ["--sandbox"]), "--no-sandbox"])
def test_a_name_with_an_at_sign_is_an_abstract_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"@kecho-{os.getpid()}"
    with ServerProcess([f"--uds={name}", sandbox]) as process:
        process.wait_until_listening()
        assert f"listening on unix {name} (" in process.stderr
        with connect("\0" + name[1:]) as client:
            assert echo(client, b"hello") == b"hello"
        with pytest.raises(kecho.ListenError, match="in use"):
            kecho.Server(uds=name).start()
        assert process.stop() == 0
    assert not list(tmp_path.iterdir())


def test_a_file_may_have_an_at_sign_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with kecho.Server(uds="./@x") as server, connect(str(tmp_path / "@x")) as client:
        assert echo(client, b"hello") == b"hello"
        assert server.addresses == ("./@x",)


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o777, 0])
def test_the_file_has_the_permissions_that_were_asked_for_whatever_the_umask(
    tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "s"
    umask = os.umask(0o027)
    try:
        with kecho.Server(uds=path, uds_mode=mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(umask)


def test_the_file_has_the_owner_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    if not is_root():
        with pytest.raises(kecho.ListenError, match="chown"):
            kecho.Server(uds=path, uds_owner="0").start()
        assert not path.exists()
        return
    with kecho.Server(uds=path, uds_owner="65534:65533", uds_mode=0o640):
        facts = path.stat()
        assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (65534, 65533, 0o640)
    with kecho.Server(uds=path, uds_owner=":65533"):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.geteuid(), 65533)


def test_an_owner_that_is_nobody_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    finished = run_command(f"--uds={tmp_path / 's'}", "--uds-owner=nobody-here")
    assert_refused(finished, 1, "--uds-owner: there is no user 'nobody-here'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"uds_mode": 0o600}, {"uds_owner": "0"}])
def test_an_abstract_socket_has_neither_permissions_nor_owner(options: dict[str, object]) -> None:
    with pytest.raises(kecho.OptionError, match="has no file"):
        kecho.Server(uds="@x", **options)

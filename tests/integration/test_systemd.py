"""Socket activation and notification: sd_listen_fds(3), sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kecho.server import systemd
from support.clients import (
    connect,
    connected_to,
    echo,
)
from support.server_process import ServerProcess, after

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


# ---- the journal: sd-daemon(3), JOURNAL_STREAM in systemd.exec(5) ------------------------------

# Of the descriptor that is stderr, as the manager does it.
TO_THE_JOURNAL = (
    "s = os.fstat(2); os.environ['JOURNAL_STREAM'] = '%d:%d' % (s.st_dev, s.st_ino + {other})"
)


@pytest.mark.e2e
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_lines_to_the_journal_carry_their_priority(log_format: str) -> None:
    arguments = ["--log-level=debug", f"--log-format={log_format}", "--backlog=1000000"]
    with ServerProcess(arguments, before=after(TO_THE_JOURNAL.format(other=0))) as process:
        process.wait_until_listening()
        assert process.stop() == 0
    lines = process.stderr.splitlines()
    priorities = {
        word: {line[:3] for line in lines if word in line}
        for word in ("truncates", "descriptors: at most", "listening on", "stopped after")
    }
    assert priorities == {
        "truncates": {"<4>"},
        "descriptors: at most": {"<7>"},
        "listening on": {"<6>"},
        "stopped after": {"<6>"},
    }
    assert all(line[3] == ("{" if log_format == "json" else "k") for line in lines)


@pytest.mark.e2e
@pytest.mark.parametrize("arguments", [["--port=99999"], ["--nonsense"], ["--host=192.0.2.1"]])
def test_errors_to_the_journal_carry_their_priority(arguments: list[str]) -> None:
    with ServerProcess(arguments, before=after(TO_THE_JOURNAL.format(other=0))) as process:
        assert process.wait() in (1, 2)
    assert process.stderr.startswith("<3>kecho: error: ")


@pytest.mark.e2e
def test_lines_to_another_place_than_the_journal_carry_none() -> None:
    with ServerProcess([], before=after(TO_THE_JOURNAL.format(other=1))) as process:
        process.wait_until_listening()
        assert process.stop() == 0
    assert "<" not in process.stderr

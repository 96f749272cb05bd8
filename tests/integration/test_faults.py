"""System calls that fail: strace(1) makes those of a server process fail, and counts them."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

from support.clients import (
    connect,
    connected,
    echo,
    plenty,
    random_bytes,
    receive_exactly,
    send_until_blocked,
    transfer,
)
from support.engines import needs_io_uring
from support.traced_server import EPOLL_WAIT, StartTraced

# strace makes a sanitized server too slow, and is itself not to be sanitized.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]


def lives(client: socket.socket) -> bool:
    """Whether a message comes back whole; False when the connection has ended either way."""
    try:
        return echo(client, b"hello") == b"hello"
    except (ConnectionResetError, BrokenPipeError):
        return False


# ---- accept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        ("EMFILE", "descriptors"),
        ("ENFILE", "descriptors"),
        ("ENOMEM", "memory"),
        ("ENOBUFS", "memory"),
        ("ECONNABORTED", "accept"),
        ("EPROTO", "accept"),
        ("ENETDOWN", "accept"),
        ("EPERM", "accept"),
        ("EINTR", "accept"),
    ],
)
def test_an_accept_that_fails_for_a_while_is_survived(
    start_traced: StartTraced, error: str, counted: str
) -> None:
    server = start_traced("accept4", f"{error}:when=1..3")
    for _ in range(5):
        with connect(server.port) as client:
            assert lives(client)
    assert server.process.stop() == 0
    assert server.injected == 3
    # Each of the 8 attempts may be followed by one that finds the queue empty, and so may a stop.
    assert server.count("accept4") <= 20
    assert "5 connections accepted" in server.process.stderr
    assert f"{counted}=3" in server.process.stderr


@pytest.mark.parametrize("error", ["EMFILE", "ENOMEM", "EPERM"])
def test_an_accept_that_always_fails_does_not_spin(start_traced: StartTraced, error: str) -> None:
    server = start_traced("accept4", error, "--graceful-timeout=1")
    with connect(server.port) as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            echo(client, b"hello")
        assert server.process.stop() == 0
    # One each 100 ms and one at the stop, and then some.
    assert 1 <= server.count("accept4") < 100


def test_a_listener_that_seemed_gone_is_accepted_from_again(start_traced: StartTraced) -> None:
    """accept says EINVAL, but the socket does listen: accepting pauses, and the server goes on."""
    server = start_traced("accept4", "EINVAL:when=1")
    with connect(server.port) as client:
        assert lives(client)
    assert server.process.stop() == 0
    assert server.injected == 1
    assert "errors accept=1" in server.process.stderr


# ---- recv and send ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason", "kind"),
    [
        ("ENOMEM", "error", "memory=1"),
        ("ENOBUFS", "error", "memory=1"),
        ("EIO", "error", "{call}=1"),
        ("ECONNRESET", "reset", "none"),
        ("EPIPE", "reset", "none"),
        ("ETIMEDOUT", "timed_out", "none"),
    ],
)
@pytest.mark.parametrize(("call", "syscall"), [("recv", "recvfrom"), ("send", "sendto")])
def test_a_failed_call_ends_its_connection_and_no_other(
    start_traced: StartTraced, call: str, syscall: str, error: str, reason: str, kind: str
) -> None:
    server = start_traced(syscall, f"{error}:when=20")
    with connect(server.port) as other:
        assert lives(other)
        with connect(server.port) as client:
            assert sum(1 for _ in iter(lambda: lives(client), False)) < 20
        assert lives(other)
        with connect(server.port) as later:
            assert lives(later)
    assert server.process.stop() == 0
    assert server.injected == 1
    summary = server.process.stderr.splitlines()[-1]
    assert re.search(rf"closed .*\b{reason}=1.*errors {kind.format(call=call)}$", summary)


@pytest.mark.parametrize(
    ("syscall", "error"), [("recvfrom", "ENOMEM"), ("sendto", "ENOMEM"), ("sendto", "EIO")]
)
def test_a_stream_that_an_error_cuts_off_does_not_look_finished(
    start_traced: StartTraced, syscall: str, error: str
) -> None:
    server = start_traced(syscall, f"{error}:when=20")
    with connect(server.port) as client:
        answers = []
        with pytest.raises(ConnectionResetError):
            answers.extend(iter(lambda: echo(client, b"x"), b""))
        assert set(answers) == {b"x"}
    assert server.process.stop() == 0


@pytest.mark.parametrize("syscall", ["recvfrom", "sendto"])
def test_an_interrupted_call_is_made_again(start_traced: StartTraced, syscall: str) -> None:
    server = start_traced(syscall, "EINTR:when=10..12")
    with connect(server.port) as client:
        for number in range(20):
            assert echo(client, b"%d" % number) == b"%d" % number
    assert server.process.stop() == 0
    assert server.injected == 3


# ---- epoll --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ENOSPC", "ENOMEM"])
def test_a_connection_that_epoll_does_not_take_is_closed(
    start_traced: StartTraced, error: str
) -> None:
    # A worker registers a connection each time; the main thread is done long before 20.
    server = start_traced("epoll_ctl", f"{error}:when=20")
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(30):
            with contextlib.suppress(ConnectionResetError):  # closed before connect() returned
                clients.append(stack.enter_context(connect(server.port)))
        for client in clients:
            lives(client)  # its first echo may come before the registration
        assert [lives(client) for client in clients].count(True) == 29
        assert [lives(client) for client in clients].count(True) == 29
    assert server.process.stop() == 0
    assert server.injected == 1


def test_a_backpressured_connection_that_epoll_does_not_take_is_reset(
    start_traced: StartTraced,
) -> None:
    # The worker's second call, which asks for room to send. The main thread's second one is the
    # removal of a listener that is not there yet, which fails in any case.
    server = start_traced("epoll_ctl", "ENOMEM:when=2")
    with connect(server.port, receive_buffer=4096, send_buffer=65536) as client:
        assert lives(client)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_until_blocked(client, plenty())
    with connect(server.port) as other:
        assert lives(other)
    assert server.process.stop() == 0
    assert "memory=1" in server.process.stderr


def test_an_interrupted_wait_is_waited_again(start_traced: StartTraced) -> None:
    server = start_traced(EPOLL_WAIT, "EINTR:when=2..5")
    with connect(server.port) as client:
        for number in range(20):
            assert echo(client, b"%d" % number) == b"%d" % number
    assert server.process.stop() == 0
    assert server.injected == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_a_wait_that_fails_ends_the_process_with_one_line(
    start_traced: StartTraced, threads: int, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    server = start_traced(
        EPOLL_WAIT, "EBADF:when=5", f"--threads={threads}", "--port=0", f"--uds={path}"
    )
    with connect(server.port) as client:
        while lives(client):
            pass
        assert server.process.wait() == 1
    assert not path.exists()
    start_line, *said = server.process.stderr.splitlines()
    assert "listening" in start_line
    assert len(said) == 1, server.process.stderr
    assert re.fullmatch(r"kecho: error: .*epoll_wait.*", said[0])


# ---- the ring -----------------------------------------------------------------------------------


@needs_io_uring
@pytest.mark.parametrize("error", ["EINTR", "EAGAIN", "EBUSY", "ETIME"])
def test_a_ring_that_cannot_be_entered_now_and_then_loses_nothing(
    start_traced: StartTraced, error: str
) -> None:
    fault = f"{error}:when=2+2"  # every other time, submissions among them
    server = start_traced("io_uring_enter", fault, "--engine", "io_uring")
    for size in (1, 100, 4096, 300_000):
        with connected(server.port, 5) as clients:
            for client in clients:
                assert echo(client, b"in the ring") == b"in the ring"
            for client in clients:
                assert transfer(client, random_bytes(size)) == random_bytes(size)
    assert server.process.stop() == 0
    assert server.injected > 10


@needs_io_uring
@pytest.mark.parametrize(
    ("error", "said"),
    [("EFAULT", "Bad address"), ("EAGAIN", "Resource temporarily unavailable"), ("EBUSY", "busy")],
)
def test_a_ring_that_cannot_be_entered_any_more_ends_the_process_with_one_line(
    start_traced: StartTraced, error: str, said: str
) -> None:
    """Those that may pass are tried again, for a while."""
    server = start_traced("io_uring_enter", f"{error}:when=30+", "--engine", "io_uring")
    with connected(server.port, 20) as clients, contextlib.suppress(ConnectionResetError):
        while True:
            for client in clients:
                client.sendall(b"hello")
            for client in clients:
                receive_exactly(client, 5)
    assert server.process.wait() == 1
    assert re.search(f"error: .*io_uring_enter.*{said}", server.process.stderr)
    assert "Traceback" not in server.process.stderr


# ---- what an echo costs -------------------------------------------------------------------------


def test_an_echo_is_three_system_calls(start_traced: StartTraced) -> None:
    echoes = 50
    server = start_traced("all", None)
    with connect(server.port) as client:
        assert echo(client, b"registered by now") == b"registered by now"
        assert echo(client, b"first") == b"first"
        for _ in range(echoes):
            assert echo(client, b"hello") == b"hello"
        assert echo(client, b"last!") == b"last!"
    assert server.process.stop() == 0
    calls = server.calls()
    (worker,) = {thread for thread, name, _ in calls if name == "recvfrom"}
    names, arguments = zip(*(call[1:] for call in calls if call[0] == worker), strict=True)
    (begin,) = (i for i, text in enumerate(arguments) if names[i] == "sendto" and "first" in text)
    (end,) = (i for i, text in enumerate(arguments) if names[i] == "recvfrom" and "last" in text)
    names = names[begin + 1 : end]
    wait = names[0]
    assert wait in ("epoll_wait", "epoll_pwait")
    assert list(names) == [wait, "recvfrom", "sendto"] * echoes + [wait]

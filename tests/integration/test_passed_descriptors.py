"""Descriptors that a client of a Unix socket passes: SCM_RIGHTS of unix(7)."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from kecho.server.sockets import unix
from support.clients import (
    DEADLINE_S,
    connect,
    connected_to,
    echo,
    receive_exactly,
    send_until_blocked,
)
from support.fixture_types import StartProcess, StartServer
from support.server_process import ServerProcess

THREADS = 2
LINGER_S = 3600


def can_refuse() -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        return unix.refuse_descriptors(one)


needs_refusal = pytest.mark.skipif(
    not can_refuse(), reason="SO_PASSRIGHTS is new in Linux 6.16: descriptors cannot be refused"
)


def pass_descriptor(client: socket.socket, fd: int) -> None:
    client.sendmsg([b"with"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def send_around_descriptor(client: socket.socket, fd: int) -> bytes:
    """Returns what the echo will be."""
    client.sendall(b"before")
    if can_refuse():
        with pytest.raises(PermissionError):
            pass_descriptor(client, fd)
        client.sendall(b"with")
    else:
        pass_descriptor(client, fd)
    client.sendall(b"after")
    return b"beforewithafter"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        with suppress(OSError):  # the test has closed it
            os.close(fd)


def test_the_server_keeps_no_passed_descriptor(
    start_server: StartServer, dispatch: str, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    start_server(uds=tmp_path / "s", dispatch=dispatch)
    with connect(str(tmp_path / "s")) as client:
        for _ in range(50):
            expected = send_around_descriptor(client, pipe[1])
            assert receive_exactly(client, len(expected)) == expected
        # Without ours the pipe has no writer any more.
        os.close(pipe[1])
        os.set_blocking(pipe[0], False)
        assert os.read(pipe[0], 1) == b""


@pytest.mark.e2e
@pytest.mark.parametrize("before_accept", [False, True])
def test_a_passed_descriptor_between_two_reads_does_not_stall_what_follows(
    start_process: StartProcess,
    dispatch: str,
    tmp_path: Path,
    pipe: tuple[int, int],
    before_accept: bool,
) -> None:
    path = str(tmp_path / "s")
    process = start_process("--dispatch", dispatch, "--threads", "2", "--uds", path)
    with connect(path) as client:
        assert echo(client, b"x") == b"x"
        with process.paused():
            other = connect(path) if before_accept else client
            expected = send_around_descriptor(other, pipe[1])
        with other:
            assert receive_exactly(other, len(expected)) == expected
    assert process.stop() == 0


# ---- what takes its time to close ---------------------------------------------------------------


def lingering(stack: ExitStack) -> int:
    """A TCP socket whose last close(2) waits an hour: its peer does not read what is unsent yet.
    Returns a descriptor that is the only one, and the caller's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = stack.enter_context(socket.create_connection(listener.getsockname(), DEADLINE_S))
        stack.enter_context(listener.accept()[0])
    send_until_blocked(one, bytes(16 << 20), quiet_s=0.1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
    return one.detach()


def leave_to_server(process: ServerProcess, client: socket.socket, fd: int) -> None:
    """Passes it, if the kernel lets us, so that whoever receives the message has it alone."""
    with process.paused():
        try:
            pass_descriptor(client, fd)
        except PermissionError:
            # Not by close(2), which would wait.
            with socket.socket(fileno=fd) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            os.close(fd)


@needs_refusal
@pytest.mark.e2e
@pytest.mark.parametrize("is_inherited", [False, True])
def test_a_passed_socket_that_lingers_holds_no_thread_and_no_stop_up(
    tmp_path: Path, dispatch: str, is_inherited: bool
) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        arguments = ["--port=0", f"--threads={THREADS}", f"--dispatch={dispatch}"]
        if is_inherited:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            arguments.append(f"--fd={listener.fileno()}")
        else:
            arguments.append(f"--uds={tmp_path / 's'}")
        server = stack.enter_context(
            ServerProcess(arguments, pass_fds=[listener.fileno()] if is_inherited else [])
        )
        server.wait_until_listening()
        for _ in range(2 * THREADS):
            client = stack.enter_context(connect(str(tmp_path / "s")))
            assert echo(client, b"hello") == b"hello"
            leave_to_server(server, client, lingering(stack))
        for address in (server.port, str(tmp_path / "s")) * THREADS:
            with connect(address) as other:
                other.settimeout(5)
                assert echo(other, b"hello") == b"hello"
        assert server.stop() == 0


def test_a_listener_that_is_inherited_has_them_refused_too(
    start_server: StartServer, pipe: tuple[int, int]
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0kecho-passed-{os.getpid()}")
        listener.listen()
        assert unix.takes_descriptors(listener)
        start_server(fd=listener.fileno())
        assert unix.takes_descriptors(listener) is not can_refuse()
        with connected_to(listener) as client:
            expected = send_around_descriptor(client, pipe[1])
            assert receive_exactly(client, len(expected)) == expected


def test_a_kernel_that_cannot_refuse_them_is_told_of_in_one_line(
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(unix, "_SO_PASSRIGHTS", 9999)  # which no kernel has
    with caplog.at_level("INFO"):
        start_server(port=0)
        assert "descriptor" not in caplog.text
        start_server(uds=tmp_path / "s", port=0)
    (line,) = [one for one in caplog.messages if "descriptor" in one]
    assert "Linux 6.16" in line
    with connect(str(tmp_path / "s")) as client:
        assert echo(client, b"hello") == b"hello"

"""The dropper and processes: that one cannot be seen is not that it is not there."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from kecho import drop
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import (
    Ends,
    as_ordinary_user,
    assert_alive,
    become_nobody,
    in_a_child,
    run_drop,
)
from support.namespaces import Namespace
from support.own_network import LIBC, checked

pytestmark = pytest.mark.privileged

CLONE_NEWNS = 0x20000
SYS_EXIT = {"x86_64": 60, "aarch64": 93}  # <asm/unistd.h>

FIRST_THREAD_ENDS = """
import ctypes, os, sys, threading
def hold():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=hold).start()
ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)
"""


@pytest.fixture
def ends(inside: Namespace, stack: ExitStack) -> Ends:
    return Ends("127.0.0.1", stack)


@contextmanager
def holding(one: socket.socket, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has inherited the socket, until its standard input ends."""
    fds = (one.fileno(),)
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds) as process:
        try:
            yield process
        finally:
            process.kill()


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_process_whose_first_thread_has_ended_still_holds_its_sockets(ends: Ends) -> None:
    if platform.machine() not in SYS_EXIT:
        pytest.skip("the number of exit(2) is not known here")
    client, _ = ends.connect()
    others = ends.connect()
    number = str(SYS_EXIT[platform.machine()])
    with holding(client, sys.executable, "-c", FIRST_THREAD_ENDS, number) as process:
        wait_for(lambda: state(process.pid) == "Z", "the first thread has ended")
        assert os.listdir(f"/proc/{process.pid}/fd") == []
        (found,) = drop.find(pid=process.pid)
        assert found.local_port == client.getsockname()[1]
        finished = run_drop("--pid", str(process.pid))
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "kecho.drop: 1 dropped\n"
    assert_alive(others)


# Prints its port, and holds until its standard input ends: a connection by a table of descriptors
# that one thread has for itself.
THREAD_WITH_DESCRIPTORS = """
import ctypes, os, socket, sys, threading
def hold():
    if ctypes.CDLL(None).unshare(0x400):  # CLONE_FILES
        os._exit(1)
    client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    print(client.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=hold).start()
threading.Event().wait()
"""


def test_socket_that_one_thread_alone_holds_is_held_by_the_process(ends: Ends) -> None:
    others = ends.connect()
    command = [sys.executable, "-c", THREAD_WITH_DESCRIPTORS, str(ends.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            server, _ = ends.listener.accept()
            server.settimeout(DEADLINE_S)
            (found,) = drop.find(pid=process.pid)
            assert found.local_port == port
            (line,) = run_drop("--list", "--local", f":{port}").stdout.splitlines()[1:]
            assert f" {process.pid}/" in line
            finished = run_drop("--pid", str(process.pid))
        finally:
            process.kill()
    assert (finished.returncode, finished.stderr) == (0, "kecho.drop: 1 dropped\n")
    with server, pytest.raises(ConnectionResetError):
        server.recv(1)
    assert_alive(others)


def ended_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait(DEADLINE_S)
    return process.pid


@pytest.mark.parametrize("form", [[], ["--list"]], ids=["drop", "list"])
def test_process_that_is_not_there_is_said_and_matches_nothing(ends: Ends, form: list[str]) -> None:
    pid = ended_pid()
    finished = run_drop(*form, "--pid", str(pid))
    assert (finished.returncode, finished.stdout) == (1, "")
    assert f"--pid {pid}: there is no process {pid}\n" in finished.stderr
    with pytest.raises(ProcessLookupError, match="no process"):
        drop.find(pid=pid)


def hide_processes() -> None:
    checked(LIBC.unshare(CLONE_NEWNS))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
    become_nobody()


def have_no_proc() -> None:
    checked(LIBC.unshare(CLONE_NEWNS))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["umount", "-l", "/proc"], check=True)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (become_nobody, "may not be read"),
        (hide_processes, "cannot be seen, as /proc is mounted with hidepid"),
        (have_no_proc, "/proc is not mounted"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--list"]], ids=["drop", "list"])
def test_process_that_cannot_be_seen_is_told_from_one_that_is_not_there(
    ends: Ends, before: Callable[[], None], reason: str, form: list[str]
) -> None:
    connection = ends.connect()
    pid = os.getpid()
    status, said = in_a_child(*form, "--pid", str(pid), before=before)
    assert status == 4, said
    assert said.startswith(f"kecho.drop: error: --pid {pid}: ")
    assert reason in said
    assert said.count("\n") == 1
    assert_alive(connection)


def test_process_that_is_hidden_does_not_hide_one_that_has_ended(ends: Ends) -> None:
    pid = ended_pid()
    status, said = in_a_child("--list", "--pid", str(pid), before=hide_processes)
    assert status == 1
    assert f"there is no process {pid}" in said


@pytest.mark.parametrize("before", [hide_processes, have_no_proc])
def test_list_without_a_view_of_processes_shows_the_sockets(
    ends: Ends, before: Callable[[], None]
) -> None:
    ends.connect()
    status, said = in_a_child("--list", "--local", f":{ends.port}", before=before)
    assert status == 0, said
    assert said.splitlines()[1].endswith("?")


def test_process_in_another_network_namespace_is_said_with_the_way_to_it(
    ends: Ends, new_namespace: Callable[[], Namespace], stack: ExitStack
) -> None:
    connection = ends.connect()
    other = new_namespace()
    with other:
        there = Ends("127.0.0.1", stack)
        client, _ = there.connect()
        process = stack.enter_context(holding(client, "cat"))
    for form in ([], ["--list"]):
        finished = run_drop(*form, "--pid", str(process.pid))
        assert (finished.returncode, finished.stdout) == (4, "")
        assert f"--netns pid:{process.pid}" in finished.stderr
    finished = run_drop("--netns", f"pid:{process.pid}", "--pid", str(process.pid))
    assert finished.returncode == 0, finished.stderr
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    assert_alive(connection)


def test_ordinary_user_sees_whose_socket_it_may_not_tell(ends: Ends, stack: ExitStack) -> None:
    ends.connect()
    status, said = as_ordinary_user("--list", "--local", f":{ends.port}")
    assert status == 0
    assert said.splitlines()[1].endswith("?")

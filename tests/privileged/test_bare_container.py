"""The command in surroundings that containers make: name servers that do not answer, PID 1, little
memory, nothing of what a system usually has."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.clients import DEADLINE_S, connect, connected, echo, wait_for
from support.namespaces import Namespace
from support.server_process import ServerProcess, after, only_child

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# A sanitizer's runtime needs /proc and much memory; mount(8), into which it is loaded, fails.
pytestmark = [pytest.mark.e2e, pytest.mark.privileged, pytest.mark.slow_under_sanitizers]


@pytest.fixture
def silent_resolver(inside: Namespace, tmp_path: Path) -> Iterator[tuple[list[str], socket.socket]]:
    """A command that runs another one with this name server, and the name server, which never
    answers. resolv.conf(5): two tries of 5 s."""
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\n")
    mount = f'mount --bind {conf} "$(realpath /etc/resolv.conf)" && exec "$@"'
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(DEADLINE_S)
        one.bind(("127.0.0.1", 53))
        yield ["unshare", "--mount", "sh", "-c", mount, "sh"], one


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_start_that_waits_for_a_name(
    silent_resolver: tuple[list[str], socket.socket], number: signal.Signals
) -> None:
    before, asked = silent_resolver
    arguments = ["--host=slow.example", "--port=0"]
    with ServerProcess(arguments, before=before) as process:
        assert b"slow\x07example" in asked.recv(512)
        process.send(number)
        assert process.wait() == 0, process.stderr
    assert "stopped after" in process.stderr
    assert "listening" not in process.stderr


BARE = """
import os, subprocess, sys
from kecho.server import _sandbox

root, group, *command = sys.argv[1:]
if group:
    with open(f"{group}/cgroup.procs", "w") as procs:
        procs.write(str(os.getpid()))
here = os.getcwd()
for mount in (
    ["--rbind", "/", root],
    *(["-t", "tmpfs", "none", f"{root}/{name}", "-o", "ro"] for name in ("dev", "proc", "sys")),
    ["-o", "remount,bind,ro", root],
):
    subprocess.run(["mount", *mount], check=True)
os.chroot(root)
os.chdir(here)
_sandbox.drop_bounding_set()
_sandbox.drop_capabilities()
os.execv(command[0], command)
"""


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path | None]:
    """A memory cgroup; None: none can be made here (version 1 alone is tried)."""
    group = Path(f"/sys/fs/cgroup/memory/kecho-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()


def test_clients_that_do_not_read_do_not_have_a_server_of_little_memory_killed(
    inside: Namespace, stack: ExitStack
) -> None:
    group = stack.enter_context(memory_group(32 << 20))
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    enter = after(f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))")
    process = stack.enter_context(ServerProcess(["--backlog=1024"], before=enter))
    process.wait_until_listening()
    assert "buffers 8M" in process.stderr
    clients = stack.enter_context(connected(process.port, 900, receive_buffer=4096))
    for client in clients:
        client.setblocking(False)
    is_over = threading.Event()

    def send() -> None:
        open_clients, chunk = list(clients), bytes(1 << 18)
        while not is_over.is_set():
            for client in select.select([], open_clients, [], 0.1)[1]:
                try:
                    client.send(chunk)
                except BlockingIOError:
                    pass
                except (ConnectionResetError, BrokenPipeError):
                    open_clients.remove(client)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        process.wait_until_said("--max-buffer-memory is reached", 2 * DEADLINE_S)
    finally:
        is_over.set()
        sending.join(DEADLINE_S)
    assert process.stop() == 0


def test_pid_1_of_a_bare_container_serves_and_drains(
    inside: Namespace, stack: ExitStack, tmp_path: Path, dispatch: str
) -> None:
    """A root of which nothing can be written, without /dev/null, /proc and /sys; no capability."""
    group = stack.enter_context(memory_group(32 << 20))
    (tmp_path / "root").mkdir()
    before = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, "-c", BARE]
    before += [str(tmp_path / "root"), str(group or "")]
    service = {"KECHO_PORT": "tcp://1.2.3.4:5", "PYTHONDONTWRITEBYTECODE": "1"}
    with ServerProcess(["--dispatch", dispatch], service, before=before) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
            asked = time.monotonic()
            os.kill(only_child(process.pid), signal.SIGTERM)
            assert client.recv(1) == b""
        assert process.wait() == 0
        assert time.monotonic() - asked < 1
    assert "drained=1" in process.stderr
    assert "error" not in process.stderr.replace("errors none", "")

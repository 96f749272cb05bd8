"""The dropper and its standard input: where pairs may come from, a filter alone does nothing."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kecho import drop
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import (
    COMMAND,
    Ends,
    assert_alive,
    make_time_wait,
    pair_of,
    run_drop,
    started,
)
from support.namespaces import Namespace
from support.server_process import after

pytestmark = pytest.mark.privileged


@pytest.fixture
def ends(inside: Namespace, stack: ExitStack) -> Ends:
    return Ends("127.0.0.1", stack)


@pytest.mark.parametrize("kind", ["file", "late pipe", "silent pipe", "empty pipe", "socket"])
def test_filter_alone_drops_nothing_while_standard_input_may_hold_pairs(
    ends: Ends, stack: ExitStack, tmp_path: Path, kind: str
) -> None:
    connections = [ends.connect() for _ in range(3)]
    line = pair_of(connections[0][0]) + "\n"
    given: Any
    if kind == "file":
        path = tmp_path / "pairs"
        path.write_text(line)
        given = stack.enter_context(path.open())
    elif kind == "socket":
        given, other = socket.socketpair()
        stack.enter_context(given)
        stack.enter_context(other).sendall(line.encode())
        other.shutdown(socket.SHUT_WR)
    else:
        given, write_fd = os.pipe()
        stack.callback(os.close, given)
        if kind == "empty pipe":
            os.close(write_fd)
        else:
            stack.callback(os.close, write_fd)
    for more in ([], ["--dry-run"]):
        with started("--peer", f":{ends.port}", *more, stdin=given) as process:
            out, said = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (2, "")
        assert "add - to drop the pairs that match, or </dev/null to drop all that matches" in said
    assert_alive(*connections)


@pytest.mark.parametrize("kind", ["closed", "null", "terminal"])
def test_filter_alone_drops_all_that_matches_where_no_pairs_can_come(
    ends: Ends, stack: ExitStack, kind: str
) -> None:
    client, _ = ends.connect()
    wrapped = after("os.close(0)") if kind == "closed" else []
    controller, terminal = pty.openpty()
    stack.callback(os.close, controller)
    stack.callback(os.close, terminal)
    finished = subprocess.run(
        [*wrapped, *COMMAND, "--peer", f":{ends.port}"],
        stdin=terminal if kind == "terminal" else subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert finished.returncode == 0, finished.stderr
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)


def test_pairs_from_a_closed_standard_input_are_a_usage_error() -> None:
    wrapped = after("os.close(0)")
    finished = subprocess.run(
        [*wrapped, *COMMAND, "-"], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("kecho.drop: error: standard input: is closed")
    assert finished.stderr.count("\n") == 1


def test_standard_input_that_cannot_be_read_is_a_usage_error() -> None:
    with open(os.devnull, "w") as unreadable:
        finished = subprocess.run(
            [*COMMAND, "-"], stdin=unreadable, capture_output=True, text=True, timeout=DEADLINE_S
        )
    assert finished.returncode == 2
    assert "error: standard input: Bad file descriptor" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
@pytest.mark.parametrize("more", [[], ["-"], ["-", "--state", "established"], ["--watch", "1"]])
def test_pipe_without_pairs_matches_nothing(ends: Ends, text: str, more: list[str]) -> None:
    connection = ends.connect()
    finished = run_drop(*more, text=text)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr == "kecho.drop: standard input has no pairs: nothing matches\n"
    assert_alive(connection)


def refused(given: Any) -> str:
    finished = subprocess.run(
        [*COMMAND, "-"], stdin=given, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    return finished.stderr


def test_input_of_any_length_is_read_to_a_bound(tmp_path: Path) -> None:
    line = b"#" * ((1 << 20) - 1) + b"\n"
    with (tmp_path / "large").open("w+b") as large:
        for _ in range(65):
            large.write(line)
        large.seek(0)
        assert "more than 67,108,864 bytes" in refused(large)
    with open("/dev/zero", "rb") as endless:
        assert "standard input, line 1: more than 1,048,576 bytes" in refused(endless)


@pytest.mark.release
@pytest.mark.python_only
@pytest.mark.timeout(1200)
def test_pairs_take_little_memory(inside: Namespace, tmp_path: Path) -> None:
    count = 200_000
    with (tmp_path / "pairs").open("w+") as pairs:
        for i in range(count):
            pairs.write(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}:{1 + i % 65535} 10.0.0.1:80\n")
        pairs.seek(0)
        wrapped = after("resource.setrlimit(resource.RLIMIT_DATA, 2 * (64 << 20,))")
        for more in ([], ["--json"]):
            pairs.seek(0)
            finished = subprocess.run(
                [*wrapped, *COMMAND, "-", *more], stdin=pairs, capture_output=True, timeout=600
            )
            assert finished.returncode == 1, finished.stderr
            assert finished.stdout.count(b"gone") == count + bool(more)


TOOLS = {
    "ss": ["ss", "-tnpeo"],
    "ss of a state": ["ss", "-tn", "state", "established"],
    "netstat": ["netstat", "-tnpo"],
    "lsof": ["lsof", "-nP", "-i", "TCP"],
    "proc": ["cat", "/proc/net/tcp", "/proc/net/tcp6"],
    "list": [*COMMAND, "--list"],
}


@pytest.mark.parametrize("kind", ["127.0.0.1", "::1", "mapped"])
@pytest.mark.parametrize("tool", TOOLS)
def test_all_that_another_tool_prints_is_dropped(
    inside: Namespace, stack: ExitStack, tool: str, kind: str
) -> None:
    if shutil.which(TOOLS[tool][0]) is None:
        pytest.skip(f"needs {TOOLS[tool][0]}")
    ends = Ends(kind, stack)
    connections = [ends.connect() for _ in range(3)]
    given = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    asked: dict[str, Any] = {**given, "timeout": DEADLINE_S}
    shown = subprocess.run(TOOLS[tool], **asked).stdout
    mine = [line for line in shown.splitlines(keepends=True) if "LISTEN" not in line]
    if tool == "proc":
        mine = [line for line in mine if " 0A " not in line]
    finished = run_drop(text="".join(mine))
    # Both ends are here: one is often gone by the other's reset.
    assert finished.returncode in (0, 1), finished.stderr
    assert finished.stdout.count("\n") == 6
    assert drop.find() == []
    ends.assert_accepts()
    for client, _ in connections:
        with pytest.raises(ConnectionError):
            client.recv(1)


# Another user's process with a listener: its name (comm), or the name of the program that it is.
NAMED = """
import ctypes, os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
os.set_inheritable(listener.fileno(), True)
print("listening", flush=True)
if sys.argv[1] == "comm":
    ctypes.CDLL(None).prctl(15, os.fsencode(sys.argv[2]), 0, 0, 0)
    print("named", flush=True)
    sys.stdin.read()
else:
    print("named", flush=True)
    os.execv("/bin/cat", [sys.argv[2]])
"""


@pytest.mark.parametrize(
    ("tool", "kind", "form"),
    [
        *(("ss", "comm", form) for form in ("\n{} #", "\n{}\n#", "\n{}# ")),
        ("netstat", "program", "x\n{}"),
    ],
)
def test_name_with_a_newline_drops_no_other_listener(
    ends: Ends, stack: ExitStack, tool: str, kind: str, form: str
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    other = stack.enter_context(socket.socket())
    other.bind(("0.0.0.0", 80))
    other.listen()
    named = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", NAMED, kind, form.format("*:80 *:*")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(named.kill)
    assert named.stdout is not None
    assert [named.stdout.readline() for _ in range(2)] == ["listening\n", "named\n"]
    command = Path(f"/proc/{named.pid}/cmdline")
    if kind == "program":
        wait_for(lambda: command.read_bytes().startswith(b"x\n"), "the program runs")
    shown = subprocess.run(
        [tool, "-tlnp"], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    ).stdout
    assert "\n*:80 *:*" in shown, "the tool writes names as they are"
    finished = run_drop("--listeners", text=shown)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert f"{tool} -tn prints no names" in finished.stderr
    rest = [line for line in shown.split("\n") if f"pid={named.pid}," in line]
    assert bool(rest) == (tool == "ss")
    assert run_drop("--listeners", text="\n".join(rest)).returncode in (1, 2)
    with socket.create_connection(("127.0.0.1", 80), DEADLINE_S):
        other.accept()[0].close()


@pytest.mark.parametrize("table", ["udp", "udp6", "raw"])
def test_line_of_proc_of_what_is_no_tcp_socket_is_refused(
    inside: Namespace, stack: ExitStack, table: str
) -> None:
    family = socket.AF_INET6 if table == "udp6" else socket.AF_INET
    ends = Ends("::1" if table == "udp6" else "127.0.0.1", stack)
    client, server = ends.connect()
    kind = socket.SOCK_RAW if table == "raw" else socket.SOCK_DGRAM
    proto = socket.IPPROTO_ICMP if table == "raw" else 0
    other = stack.enter_context(socket.socket(family, kind, proto))
    other.bind(client.getsockname())  # the same ends as the connection has
    other.connect(client.getpeername())
    finished = run_drop(text=Path(f"/proc/thread-self/net/{table}").read_text())
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "line 2: a line of /proc/net/udp, raw or icmp: only TCP" in finished.stderr
    assert_alive((client, server))


def test_line_of_proc_of_a_time_wait_has_fewer_columns_and_is_dropped(ends: Ends) -> None:
    make_time_wait(ends, 1)
    lines = Path("/proc/thread-self/net/tcp").read_text().splitlines(keepends=True)
    finished = run_drop(text="".join(line for line in lines if " 0A " not in line))
    assert (finished.returncode, finished.stderr) == (0, "kecho.drop: 1 dropped\n")

"""The dropper's command on real sockets, each test in a network namespace of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from kecho import drop
from kecho.drop import Pair
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import Ends, as_ordinary_user, make_time_wait, run_drop
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

FAMILIES = ("127.0.0.1", "::1", "mapped")


@pytest.fixture(params=FAMILIES)
def ends(inside: Namespace, stack: ExitStack, request: pytest.FixtureRequest) -> Ends:
    return Ends(request.param, stack)


# ---- 4: many ------------------------------------------------------------------------------------


def test_thousands_of_time_wait_are_dropped_and_none_is_left(
    inside: Namespace, stack: ExitStack
) -> None:
    ends = Ends("127.0.0.1", stack)
    make_time_wait(ends, 3000)
    there = len(drop.find(states=["time-wait"]))
    assert there >= 3000 - 5
    finished = run_drop("--state", "time-wait", "--peer", f":{ends.port}")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == there
    assert f"{there:,} dropped" in finished.stderr
    assert drop.find(states=["time-wait"]) == []
    ends.assert_accepts()
    assert run_drop("--state", "time-wait", "--peer", f":{ends.port}").returncode == 1


def test_pairs_on_standard_input_are_narrowed_by_the_filter(
    inside: Namespace, stack: ExitStack
) -> None:
    ends = Ends("127.0.0.1", stack)
    (client, _), (other, other_server) = ends.connect(), ends.connect()
    line = f"127.0.0.1:{client.getsockname()[1]} 127.0.0.1:{ends.port}\n"
    strangers = f"127.0.0.1:{ends.port} 127.0.0.1:{other.getsockname()[1]}\n"
    narrowed = run_drop("-", "--peer", f":{ends.port}", text=line + strangers)
    assert narrowed.returncode == 3, narrowed.stderr
    assert "1 protected, 1 dropped" in narrowed.stderr
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    other.sendall(b"alive")
    assert other_server.recv(5) == b"alive"


# ---- 5: no privilege ----------------------------------------------------------------------------


def test_ordinary_user_lists_but_drops_nothing(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    client, server = ends.connect()
    status, listed = as_ordinary_user("--list", "--peer", f":{ends.port}")
    assert status == 0, listed
    assert "established" in listed
    pair = drop.find([ends.pair(client)])[0].pair
    for arguments in (
        ["--peer", f":{ends.port}"],
        ["--until-empty", "--peer", f":{ends.port}"],
        str(pair).split(),
    ):
        status, said = as_ordinary_user(*arguments)
        assert status == 4, said
        assert "CAP_NET_ADMIN" in said
        assert "setcap" in said
        assert "refused" in said
    client.sendall(b"alive")
    assert server.recv(5) == b"alive"


# ---- the command --------------------------------------------------------------------------------


def test_lines_of_netstat_are_dropped(ends: Ends) -> None:
    client, server = ends.connect()
    pair = drop.find([ends.pair(client)])[0].pair
    finished = run_drop(text=f"# a comment\n\n{pair}\n")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"dropped    {pair}  established\n"
    assert finished.stderr == "kecho.drop: 1 dropped\n"
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_wrong_line_drops_nothing(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    client, server = ends.connect()
    good = str(Pair(*drop.find([ends.pair(client)])[0].pair))
    for bad in ("127.0.0.1:0 127.0.0.1:1", "x" * (10 << 20), "a\0b", "127.0.0.1:1 [::1]:2"):
        finished = run_drop(text=f"{good}\n{bad}\n{good}\n")
        assert finished.returncode == 2
        assert "line 2" in finished.stderr
        assert len(finished.stderr) < 500
        assert finished.stdout == ""
    client.sendall(b"alive")
    assert server.recv(5) == b"alive"


def test_dry_run_drops_nothing(ends: Ends) -> None:
    client, server = ends.connect()
    finished = run_drop("--dry-run", "--peer", f":{ends.port}", "--state", "connected")
    assert finished.returncode == 0
    assert finished.stdout.startswith("would drop ")
    client.sendall(b"alive")
    assert server.recv(5) == b"alive"


def test_until_empty_drops_every_one(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    make_time_wait(ends, 300)
    assert run_drop("--until-empty", "-q", "--state", "time-wait").returncode == 0
    assert drop.find(states=["time-wait"]) == []


def test_watch_drops_what_comes_until_the_signal(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    with subprocess.Popen(
        [sys.executable, "-m", "kecho.drop", "--watch", "0.05", "--state", "time-wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            for _ in range(3):
                make_time_wait(ends, 20)
                wait_for(lambda: not drop.find(states=["time-wait"]), "dropped")
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "dropped" in said


def test_interrupt_tells_the_fate_of_every_socket(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    make_time_wait(ends, 6000)
    there = len(drop.find(states=["time-wait"]))
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "kecho.drop", "--state", "time-wait"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert process.stderr
            first = process.stdout.readline()  # unread, the rest fills the pipe and makes it wait
            process.send_signal(signal.SIGINT)
            rest, said = process.stdout.read(), process.stderr.read()
            process.wait(DEADLINE_S)
        finally:
            process.kill()
    told = (first + rest).count("\n")
    assert process.returncode == 128 + signal.SIGINT
    assert f"interrupted: {told:,} dropped" in said
    assert len(drop.find(states=["time-wait"])) == there - told > 0


def test_named_namespace_is_worked_in(namespace: Namespace, stack: ExitStack) -> None:
    name = f"kecho-test-{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no named namespace can be made: {error.stderr!r}")
    stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
    before = os.readlink("/proc/thread-self/ns/net")
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    assert drop.find(netns=name, listeners=True) == []
    assert os.readlink("/proc/thread-self/ns/net") == before
    other = Namespace.__new__(Namespace)
    other._outside, other.fd = [], os.open(f"/run/netns/{name}", os.O_RDONLY)
    stack.callback(other.close)
    with other:
        ends = Ends("127.0.0.1", stack)
        client, _server = ends.connect()
    finished = run_drop("--netns", name, "--peer", f":{ends.port}")
    assert finished.returncode == 0, finished.stderr
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    absent = run_drop("--netns", "kecho-absent", "--peer", ":1")
    assert absent.returncode == 2
    assert "kecho-absent" in absent.stderr

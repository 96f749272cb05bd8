"""The dropper when its input, its output, a signal, the kernel or a socket gets in its way."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import ExitStack

import pytest

from kecho import drop
from kecho.drop import Result
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import (
    COMMAND,
    Ends,
    assert_alive,
    make_time_wait,
    pair_of,
    run_drop,
    run_injected,
    started,
)
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

FULL = "/dev/full"


@pytest.fixture
def ends(inside: Namespace, stack: ExitStack) -> Ends:
    return Ends("127.0.0.1", stack)


def run_with_handle(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, whose native handle has these methods instead of its own."""
    script = f"""
        import errno, os, signal, sys
        from kecho.drop import _sockdiag
        from kecho.drop import cli
        class Handle(_sockdiag.Handle):
{textwrap.indent(textwrap.dedent(body), " " * 12)}
        _sockdiag.Handle = Handle
        sys.exit(cli.main())
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- a socket goes on to another state ----------------------------------------------------------


def make_half_open(ends: Ends, count: int) -> list[socket.socket]:
    """Clients of a listener that wants data first: half-open there until they send some."""
    ends.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    ends.listener.listen(4 * count)
    clients = []
    for _ in range(count):
        client = ends.stack.enter_context(socket.socket())
        client.settimeout(DEADLINE_S)
        client.connect((ends.address, ends.port))
        clients.append(client)
    half_open = {"states": ["syn-recv"], "local": [f":{ends.port}"]}
    wait_for(lambda: len(drop.find(**half_open)) == count, "half-open")
    return clients


def test_connection_that_was_half_open_when_it_was_found_is_left(ends: Ends) -> None:
    (client,) = make_half_open(ends, 1)
    half = drop.find(states=["syn-recv"])
    client.sendall(b"x")
    server = ends.stack.enter_context(ends.listener.accept()[0])
    (outcome,) = drop.drop(half)
    assert outcome.result is Result.PROTECTED
    assert outcome.socket is not None
    assert (outcome.socket.state, outcome.socket.cookie) == ("established", half[0].cookie)
    assert server.recv(1) == b"x"
    assert_alive((client, server))


def test_reader_that_is_slow_does_not_cost_a_connection_its_life(ends: Ends) -> None:
    count, batch = 300, 128
    clients = make_half_open(ends, count)
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    asked = ("--state", "syn-recv", "--local", f":{ends.port}")
    left = {"states": ["syn-recv"], "local": [f":{ends.port}"]}
    with started(*asked, env=unbuffered, pipesize=4096) as process:
        wait_for(lambda: len(drop.find(**left)) == count - batch, "the first batch")
        spared = {one.peer_port for one in drop.find(**left)}
        for client in clients:
            client.send(b"x")
        servers = [ends.stack.enter_context(ends.listener.accept()[0]) for _ in spared]
        out, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert f"{batch} dropped, {count - batch} protected" in said
    assert out.count("no longer syn-recv") == count - batch
    for server in servers:
        server.settimeout(DEADLINE_S)
        assert server.recv(1) == b"x"
        server.sendall(b"y")


# ---- SIGINT -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "told"), [(8000, "8,000 gone, 2 not tried"), (12_000, "10,000 gone, 2,002 not tried")]
)
def test_interrupt_while_gone_pairs_are_told_spares_those_that_follow(
    ends: Ends, count: int, told: str
) -> None:
    connections = [ends.connect() for _ in range(2)]
    gone = [f"127.0.0.1:{1 + i // 250} 127.0.0.2:{1 + i % 250}" for i in range(count)]
    with tempfile.TemporaryFile("w+") as lines:
        lines.write("\n".join([*gone, *(pair_of(client) for client, _ in connections)]))
        lines.seek(0)
        with started(stdin=lines) as process:
            assert process.stdout is not None
            process.stdout.readline()  # unread, the rest fills the pipe and makes it wait
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGINT
    assert f"interrupted: {told}" in said
    assert_alive(*connections)


@pytest.mark.parametrize("signals", [1, 5])
def test_interrupt_during_the_first_batch_tells_what_was_dropped(ends: Ends, signals: int) -> None:
    for _ in range(3):
        ends.connect()
    finished = run_with_handle(
        f"""
        def destroy(self, identities):
            for _ in range({signals}):
                os.kill(os.getpid(), signal.SIGINT)
            return super().destroy(identities)
        """,
        *("--peer", f":{ends.port}"),
    )
    assert finished.returncode == 128 + signal.SIGINT
    assert "interrupted: 3 dropped\n" in finished.stderr
    assert finished.stdout.count("dropped") == 3


def test_interrupt_during_the_look_drops_nothing(ends: Ends) -> None:
    connection = ends.connect()
    finished = run_with_handle(
        """
        def dump(self, *asked):
            os.kill(os.getpid(), signal.SIGINT)
            return super().dump(*asked)
        """,
        *pair_of(connection[0]).split(),
    )
    assert finished.returncode == 128 + signal.SIGINT
    assert "interrupted: 1 not tried" in finished.stderr
    assert_alive(connection)


def test_second_interrupt_ends_what_nobody_reads(ends: Ends) -> None:
    make_time_wait(ends, 3000)
    there = len(drop.find(states=["time-wait"]))
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with started("--state", "time-wait", env=unbuffered, pipesize=4096) as process:
        wait_for(lambda: len(drop.find(states=["time-wait"])) == there - 128, "the first batch")
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        while process.poll() is None:  # two that come at once are one
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGINT
    left = len(drop.find(states=["time-wait"]))
    assert f"interrupted: {there - left:,} dropped, {left:,} not tried" in said


# ---- output that fails --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--list"], ["--list", "--json"], ["--dry-run"], ["--dry-run", "--json"], ["--json"], []],
    ids=" ".join,
)
def test_full_disk_is_status_3_and_said(ends: Ends, arguments: list[str]) -> None:
    ends.connect()
    asked = ("--peer", f":{ends.port}", *arguments)
    with open(FULL, "w") as full, started(*asked, stdout=full) as process:
        _, said = process.communicate(timeout=DEADLINE_S)
    is_dropped = arguments in ([], ["--json"])
    assert process.returncode == 3
    assert "standard output: No space left on device" in said
    assert "Traceback" not in said
    assert ("kecho.drop: 1 dropped" in said) == is_dropped
    assert bool(drop.find(peer=[f":{ends.port}"])) != is_dropped


def test_reader_that_has_enough_ends_it_and_the_rest_is_told(ends: Ends) -> None:
    make_time_wait(ends, 3000)
    there = len(drop.find(states=["time-wait"]))
    with started("--state", "time-wait") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        process.wait(DEADLINE_S)
    left = len(drop.find(states=["time-wait"]))
    assert 0 < left < there
    assert process.returncode == 3
    assert said == f"kecho.drop: stopped: {there - left:,} dropped, {left:,} not tried\n"


def test_standard_error_that_fails_does_not_change_the_status(ends: Ends) -> None:
    client, _ = ends.connect()
    pair = drop.find([ends.pair(client)])[0].pair
    for status in (0, 1):
        with open(FULL, "w") as full, started(*str(pair).split(), stderr=full) as run:
            out, _ = run.communicate(timeout=DEADLINE_S)
        assert run.returncode == status
        assert out.startswith("gone" if status else "dropped")


def read_all(fd: int, into: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # EIO: the terminal's other end is closed
        while chunk := os.read(fd, 65536):
            into.append(chunk)


def test_outcomes_reach_a_file_while_a_bar_is_on_the_terminal(ends: Ends, stack: ExitStack) -> None:
    pytest.importorskip("rich")
    make_time_wait(ends, 2000)
    there = len(drop.find(states=["time-wait"]))
    controller, terminal = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(controller, shown))
    reader.start()
    with tempfile.TemporaryFile("w+") as out:
        finished = subprocess.run(
            [*COMMAND, "--state", "time-wait"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
            timeout=60,
        )
        os.close(terminal)
        reader.join(DEADLINE_S)
        os.close(controller)
        out.seek(0)
        lines = out.read().splitlines()
    assert finished.returncode == 0
    assert len(lines) == there > 1900
    assert all(line.startswith("dropped ") for line in lines)
    assert b"dropping" in b"".join(shown)
    assert b"time-wait" not in b"".join(shown)


def test_terminal_that_goes_away_stops_nothing(ends: Ends) -> None:
    make_time_wait(ends, 3000)
    there = len(drop.find(states=["time-wait"]))
    controller, terminal = pty.openpty()
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1", "TERM": "xterm"}
    with started("--state", "time-wait", stderr=terminal, env=unbuffered) as process:
        os.close(terminal)
        assert process.stdout is not None
        process.stdout.readline()
        os.close(controller)
        rest = process.stdout.read()
        process.wait(DEADLINE_S)
    assert process.returncode == 0
    assert rest.count("\n") == there - 1


# ---- the kernel ---------------------------------------------------------------------------------


def test_kernel_that_cannot_is_status_5_and_drops_nothing(ends: Ends) -> None:
    connection = ends.connect()
    cannot = """
        def destroy(self, identities):
            return [errno.EOPNOTSUPP] * len(identities)
    """
    for arguments in (["--peer", f":{ends.port}"], pair_of(connection[0]).split()):
        finished = run_with_handle(cannot, *arguments)
        assert finished.returncode == 5
        assert finished.stdout.startswith("unsupported")
        assert "CONFIG_INET_DIAG_DESTROY" in finished.stderr
        assert "Linux 6.0" in finished.stderr
    told = json.loads(run_with_handle(cannot, "--json", "--peer", f":{ends.port}").stdout)
    assert told["outcomes"][0]["errno"] == "EOPNOTSUPP"
    assert_alive(connection)


@pytest.mark.parametrize(
    "fault",
    [
        "recvfrom:error=ENOBUFS:when=1",
        "recvfrom:error=ENOBUFS:when=1..2",
        "sendto:error=ENOBUFS:when=1",
        "sendto:error=ENOBUFS:when=3",
    ],
)
def test_kernel_that_is_short_of_memory_for_a_moment_is_asked_again(ends: Ends, fault: str) -> None:
    make_time_wait(ends, 300)
    there = len(drop.find(states=["time-wait"]))
    finished = run_injected(fault, "--state", "time-wait")
    assert finished.returncode == 0, finished.stderr
    assert f"{there} dropped\n" in finished.stderr
    assert drop.find(states=["time-wait"]) == []


LOSING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/socket.h>

/* The second datagram is lost: the kernel had no room for it, and says so once. */
ssize_t recv(int fd, void *data, size_t size, int flags)
{
    static int calls;
    ssize_t (*real)(int, void *, size_t, int) = dlsym(RTLD_NEXT, "recv");
    ssize_t received = real(fd, data, size, flags);
    if (++calls == 2) {
        errno = ENOBUFS;
        return -1;
    }
    return received;
}
"""


def test_dump_with_a_hole_is_thrown_away(ends: Ends) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc, which compiles what loses a datagram")
    count = 600  # a datagram holds some 200
    make_time_wait(ends, count)
    with tempfile.TemporaryDirectory() as directory:
        library = f"{directory}/losing.so"
        command = [compiler, "-shared", "-fPIC", "-o", library, "-x", "c", "-"]
        subprocess.run(command, input=LOSING, text=True, check=True)
        preload = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
        finished = run_drop(
            *("--list", "--state", "time-wait"), before=("env", f"LD_PRELOAD={preload}")
        )
    assert finished.returncode == 0
    assert finished.stdout.count("\ntime-wait ") == count


def test_kernel_that_stays_short_of_memory_is_an_error(ends: Ends) -> None:
    connection = ends.connect()
    for call in ("recvfrom", "sendto"):
        finished = run_injected(f"{call}:error=ENOBUFS:when=1+", "--peer", f":{ends.port}")
        assert finished.returncode == 3
        assert "SOCK_DIAG_BY_FAMILY: No buffer space available" in finished.stderr
        assert_alive(connection)


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
def test_error_in_a_later_batch_does_not_hide_the_earlier_ones(ends: Ends, form: list[str]) -> None:
    make_time_wait(ends, 600)
    there = len(drop.find(states=["time-wait"]))
    # Two looks, one for each family, and two batches go well.
    finished = run_injected("sendto:error=ENOBUFS:when=5+", *form, "--state", "time-wait")
    left = len(drop.find(states=["time-wait"]))
    assert finished.returncode == 3
    assert there - left == 256
    assert "SOCK_DESTROY: No buffer space available" in finished.stderr
    if form:
        assert json.loads(finished.stdout)["counts"] == {"dropped": 256, "not tried": left}
    else:
        assert finished.stdout.count("\n") == 256
        assert f"stopped: 256 dropped, {left} not tried" in finished.stderr


# ---- again and again ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
def test_watch_over_a_pair_that_was_dropped_ends_well(ends: Ends, form: list[str]) -> None:
    client, _ = ends.connect()
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    asked = ("--watch", "0.02", *form, *pair_of(client).split())
    with started(*asked, env=unbuffered) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        if form:
            lines += [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert ("".join(lines) + out).count("127.0.0.1:") == 2


def test_pair_of_several_listeners_is_told_for_each(inside: Namespace, stack: ExitStack) -> None:
    port = 0
    for _ in range(3):
        one = stack.enter_context(socket.socket())
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", port))
        one.listen()
        port = one.getsockname()[1]
    finished = run_drop("--listeners", "--until-empty", "--local", f":{port}")
    assert drop.find(listeners=True) == []
    assert finished.stdout.count("dropped") == 3
    assert "gone" not in finished.stdout

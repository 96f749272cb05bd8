"""Real clients against `python -m kecho`, one session after another."""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from support.clients import DEADLINE_S, echo, random_bytes
from support.fixture_types import StartProcess

pytestmark = [pytest.mark.e2e, pytest.mark.engines]

Progress = Callable[[Iterable[int], str], Iterator[int]]

CLIENTS = [name for name in ("telnet", "ncat") if shutil.which(name)]
# Under each dispatch. telnet takes some 2 ms a session, ncat 50.
SESSIONS = list(zip(CLIENTS, (1000, 50), strict=False))
RELEASE = [pytest.mark.release, pytest.mark.slow_under_sanitizers]
NEITHER = pytest.mark.skip(reason="neither telnet nor ncat is installed")

BANNER = (b"Trying ", b"Connected to ", b"Escape character is ")


@pytest.fixture
def progress(capfd: pytest.CaptureFixture[str]) -> Progress:
    """progress(numbers, what) -> the numbers, with a bar if somebody sits at a terminal."""

    def with_bar(numbers: Iterable[int], what: str) -> Iterator[int]:
        with capfd.disabled():
            if not sys.stderr.isatty():
                yield from numbers
                return
            from rich.console import Console
            from rich.progress import track

            yield from track(numbers, what, console=Console(stderr=True), transient=True)

    return with_bar


def real_session(client: str, port: int, line: bytes) -> list[bytes]:
    """What the client prints, line by line, when it is given this one."""
    environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    process = subprocess.Popen(
        [client, "127.0.0.1", str(port)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        printed = read_until(process.stdout.fileno(), line)
        rest, _ = process.communicate(timeout=DEADLINE_S)  # which ends its input
    finally:
        process.kill()
        process.communicate()
    lines = (printed + rest).splitlines()
    return [line for line in lines if not line.startswith(BANNER)]


def read_until(fd: int, text: bytes) -> bytes:
    """Clients leave as soon as their input ends, so it must not end before the reply is here."""
    printed = b""
    deadline = time.monotonic() + DEADLINE_S
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while text not in printed:
            assert selector.select(deadline - time.monotonic()), f"no reply: {printed!r}"
            chunk = os.read(fd, 65536)
            assert chunk, f"the client ended without a reply: {printed!r}"
            printed += chunk
    return printed


@pytest.mark.parametrize(
    ("client", "count"),
    [
        *(pytest.param(*one, marks=RELEASE) for one in SESSIONS),
        *([(name, 10) for name in CLIENTS] or [pytest.param("", 0, marks=NEITHER)]),
    ],
)
def test_sessions_of_a_real_client_one_after_another(
    start_process: StartProcess, dispatch: str, progress: Progress, client: str, count: int
) -> None:
    process = start_process("--dispatch", dispatch)
    for number in progress(range(count), f"{client}, dispatch {dispatch}"):
        line = b"%s %d of %d" % (client.encode(), number, count)
        assert real_session(client, process.port, line) == [line]
    assert process.stop() == 0
    summary = process.stderr.splitlines()[-1]
    assert f" {count:,} connections accepted, 0 active" in summary
    assert f"closed eof={count}, errors none" in summary


def test_a_thousand_sessions_of_a_plain_socket(
    start_process: StartProcess, dispatch: str, progress: Progress
) -> None:
    process = start_process("--dispatch", dispatch)
    for number in progress(range(1000), f"sockets, dispatch {dispatch}"):
        line = b"socket %d\n" % number
        with socket.create_connection(("127.0.0.1", process.port), DEADLINE_S) as client:
            assert echo(client, line) == line
    assert process.stop() == 0
    assert "1,000 connections accepted, 0 active" in process.stderr


@pytest.mark.skipif("ncat" not in CLIENTS, reason="ncat is not installed")
def test_ncat_gets_a_whole_file_back(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--dispatch", dispatch)
    data = random_bytes(4 << 20)
    environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    finished = subprocess.run(
        ["ncat", "127.0.0.1", str(process.port)],
        env=environment, input=data, stdout=subprocess.PIPE, timeout=DEADLINE_S,
    )  # fmt: skip
    assert finished.stdout == data

"""Connections to be dropped, and the command that drops them, for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kecho.drop import cli
from support.clients import DEADLINE_S

COMMAND = [sys.executable, "-m", "kecho.drop"]


class Ends:
    """A listener, a client and the server's end of their connection."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        self.kind, self.stack = kind, stack
        self.address = "127.0.0.1" if kind == "mapped" else kind
        family = socket.AF_INET if kind == "127.0.0.1" else socket.AF_INET6
        if family == socket.AF_INET6 and not Path("/proc/net/if_inet6").exists():
            pytest.skip("this kernel has no IPv6")
        self.family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self.listener = stack.enter_context(socket.socket(family))
        if kind == "mapped":
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.bind(("::" if kind == "mapped" else self.address, 0))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """(the client, the server's end)."""
        client = self.stack.enter_context(socket.socket(self.family))
        client.settimeout(DEADLINE_S)
        client.connect((self.address, self.port))
        server, _ = self.listener.accept()
        server.settimeout(DEADLINE_S)
        return client, self.stack.enter_context(server)

    def pair(self, one: socket.socket) -> tuple[str, int, str, int]:
        local, peer = one.getsockname()[:2], one.getpeername()[:2]
        return (*local, *peer)

    def assert_accepts(self) -> None:
        client, server = self.connect()
        client.sendall(b"hello")
        assert server.recv(5) == b"hello"


def make_time_wait(ends: Ends, count: int) -> None:
    for _ in range(count):
        client, server = ends.connect()
        client.close()
        server.close()


def run_drop(
    *arguments: str, text: str | None = None, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    given: Any = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    return subprocess.run(
        [*before, *COMMAND, *arguments],
        **given,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
    )


def run_injected(fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command under strace -e inject=FAULT."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={fault}")
    clean = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    preload = os.environ.get("LD_PRELOAD")
    passed = ("-E", f"LD_PRELOAD={preload}") if preload else ()
    return subprocess.run(
        [*strace, *passed, *COMMAND, *arguments],
        env=clean,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def in_a_child(*arguments: str, before: Callable[[], object]) -> tuple[int, str]:
    """The command in a child that has called `before`: (status, what it says)."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            status = 99
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # it is to hold no socket itself
                sys.stdin = os.fdopen(0)
                sys.stdout, sys.stderr = os.fdopen(1, "a"), os.fdopen(2, "a")
                before()
                status = cli.main(arguments)
                sys.stdout.flush()
            finally:
                os._exit(status)
        _, waited = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(waited), said.read()


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def as_ordinary_user(*arguments: str) -> tuple[int, str]:
    """The command in a child that gives its privileges up: an ordinary user may be able to read
    neither this checkout nor the interpreter."""
    return in_a_child(*arguments, before=become_nobody)


def assert_alive(*connections: tuple[socket.socket, socket.socket]) -> None:
    for client, server in connections:
        client.sendall(b"x")
        assert server.recv(1) == b"x"


def pair_of(client: socket.socket) -> str:
    return "{}:{} {}:{}".format(*client.getsockname(), *client.getpeername())


@contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, with pipes unless the options say otherwise."""
    options = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options,
    }
    with subprocess.Popen([*COMMAND, *arguments], text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()

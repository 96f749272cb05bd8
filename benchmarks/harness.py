"""What the benchmark scripts share: a server process, clients, and repeats that are interleaved."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PINGPONG = ROOT / "build" / "peers" / "pingpong"


@dataclass(frozen=True)
class RunningServer:
    pid: int
    port: int

    def rss_bytes(self) -> int:
        """Resident memory of the process: proc_pid_statm(5)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def server(*options: str) -> Iterator[RunningServer]:
    """`python -m kecho --port 0 OPTIONS`, from its start line to its orderly end."""
    command = [sys.executable, "-m", "kecho", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"tcp \S+:(\d+)", line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line}{process.stderr.read()}")
            yield RunningServer(process.pid, int(found[1]))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def pingpong(port: int, connections: int, seconds: float, size_bytes: int = 64) -> dict[str, Any]:
    """Runs the C client; its figures."""
    command = [str(PINGPONG), str(port), str(connections), str(seconds), str(size_bytes)]
    result: dict[str, Any] = json.loads(subprocess.check_output(command))
    return result


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """`count` connections that say nothing, held by another process."""
    with _in_a_child(_hold, port, count):
        yield


@contextmanager
def streams(port: int, count: int) -> Iterator[None]:
    """`count` connections, a process each, that keep their pipe full both ways."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(_in_a_child(_stream, port))
        yield


@contextmanager
def _in_a_child(work: Any, *arguments: int) -> Iterator[None]:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=work, args=(theirs, *arguments))
    child.start()
    try:
        if not ours.poll(120) or ours.recv() != "ready":
            raise RuntimeError(f"{work.__name__} did not get ready")
        yield
    finally:
        with suppress(OSError):
            ours.send("stop")
        child.join(30)
        if child.is_alive():
            child.kill()


def _hold(control: Connection, port: int, count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    control.send("ready")
    control.recv()
    for client in held:
        client.close()


def _stream(control: Connection, port: int) -> None:
    client = socket.create_connection(("127.0.0.1", port))
    block = bytes(65536)

    def send() -> None:
        with suppress(OSError):
            while True:
                client.sendall(block)

    def receive() -> None:
        with suppress(OSError):
            while client.recv(1 << 20):
                pass

    for work in (send, receive):
        threading.Thread(target=work, daemon=True).start()
    control.send("ready")
    control.recv()
    client.close()


def interleaved(rounds: int, variants: Sequence[Any], measure: Any) -> dict[Any, list[Any]]:
    """measure(variant) for every variant in turn, `rounds` times over: A B A B, so that what else
    the machine does falls on all of them alike."""
    results: dict[Any, list[Any]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            results[variant].append(measure(variant))
    return results

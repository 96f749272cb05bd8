"""How many system calls does an echo cost?

    python benchmarks/syscalls_per_echo.py [--connections 50] [--dispatch shared] [--seconds 3]
        [--client rounds|pingpong] [--counter strace|perf]

Every connection has a message under way all the time. The client `rounds` sends on all of them,
then waits for all the replies; the counter is attached while nothing moves, so that it counts the
echoes and nothing else. `pingpong` is the C client, which answers each reply at once and needs
`make`; connecting and closing is counted, too, but a fraction of a per cent. Prints JSON: the
calls by name, the echoes, and the ratio.

strace makes every call of the server slow, so that it finds more connections ready whenever it
looks: the ratio is that of a server whose clients are much faster than itself. perf, which needs
root and tracefs, hardly slows it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import harness

MESSAGE = b"x" * 64


def connect(port: int, count: int, stack: ExitStack) -> list[socket.socket]:
    """`count` connections, made from each CPU in turn: percpu spreads them by that."""
    cpus = sorted(os.sched_getaffinity(0))
    clients = []
    for number in range(count):
        os.sched_setaffinity(0, {cpus[number % len(cpus)]})
        clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)))
    os.sched_setaffinity(0, cpus)
    return clients


def one_round(clients: list[socket.socket]) -> None:
    """An echo on every connection, all of them at once."""
    for client in clients:
        client.sendall(MESSAGE)
    for client in clients:
        missing = len(MESSAGE)
        while missing:
            chunk = client.recv(missing)
            if not chunk:
                raise RuntimeError("the server closed a connection")
            missing -= len(chunk)


def rounds(clients: list[socket.socket], seconds: float) -> int:
    """Echoes made meanwhile."""
    deadline = time.monotonic() + seconds
    echoes = 0
    while time.monotonic() < deadline:
        one_round(clients)
        echoes += len(clients)
    return echoes


def wait_for(condition: Callable[[], bool], counter: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if counter.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"cannot count: {counter.communicate()}")
        time.sleep(0.01)


def is_traced(pid: int) -> bool:
    return all(
        "TracerPid:\t0\n" not in status.read_text()
        for status in Path(f"/proc/{pid}/task").glob("*/status")
    )


@contextmanager
def strace(pid: int, counts: dict[str, int]) -> Iterator[None]:
    """Counts the calls of all the threads of a process meanwhile."""
    with tempfile.NamedTemporaryFile("r") as report:
        command = ["strace", "-c", "-f", "-qq", "-o", report.name, "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as counter:
            wait_for(lambda: is_traced(pid), counter)
            yield
            counter.send_signal(signal.SIGINT)
            counter.communicate(timeout=30)
        # % time, seconds, usecs/call, calls, errors or nothing, name
        row = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", re.MULTILINE)
        found = row.findall(report.read())
    counts.update({name: int(calls) for calls, name in found if name != "total"})


@contextmanager
def perf(pid: int, counts: dict[str, int]) -> Iterator[None]:
    """The same, by the kernel's tracepoints."""
    with tempfile.NamedTemporaryFile("r") as report, ExitStack() as stack:
        control, control_path = fifo(stack)
        acknowledged, acknowledged_path = fifo(stack)
        command = [
            "perf", "stat", "-x", ",", "-e", "syscalls:sys_enter_*", "-p", str(pid),
            "-o", report.name, "--delay", "-1",
            "--control", f"fifo:{control_path},{acknowledged_path}",
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as counter:
            os.write(control, b"enable\n")
            wait_for(lambda: bool(select.select([acknowledged], [], [], 0)[0]), counter)
            yield
            counter.send_signal(signal.SIGINT)
            counter.communicate(timeout=30)
        row = re.compile(r"^(\d+),.*syscalls:sys_enter_(\w+),", re.MULTILINE)
        found = row.findall(report.read())
    counts.update({name: int(calls) for calls, name in found if calls != "0"})


def fifo(stack: ExitStack) -> tuple[int, str]:
    path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "fifo")
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    stack.callback(os.close, fd)
    return fd, path


COUNTERS = {"strace": strace, "perf": perf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--dispatch", default="shared")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--client", choices=("rounds", "pingpong"), default="rounds")
    parser.add_argument("--counter", choices=COUNTERS, default="strace")
    options = parser.parse_args()

    counts: dict[str, int] = {}
    with harness.server("--dispatch", options.dispatch) as server, ExitStack() as stack:
        counter = COUNTERS[options.counter](server.pid, counts)
        if options.client == "pingpong":
            with counter:
                run = harness.pingpong(server.port, options.connections, options.seconds)
            echoes = run["echoes"]
        else:
            clients = connect(server.port, options.connections, stack)
            one_round(clients)
            with counter:
                echoes = rounds(clients, options.seconds)
    figures = {
        "dispatch": options.dispatch,
        "connections": options.connections,
        "client": options.client,
        "counter": options.counter,
        "syscalls": dict(sorted(counts.items(), key=lambda item: -item[1])),
        "echoes": echoes,
        "syscalls_per_echo": round(sum(counts.values()) / echoes, 4),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

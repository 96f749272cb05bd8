"""A client process that connects as fast as it can, for tests of what a restart does to clients."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from support.namespaces import Namespace

LONGEST_S = 120

# Runs until its stdin ends: one connection after the other, one echo each. "failed" has the errors
# of connect(), "unanswered" how often a connection ended before its echo, and with what.
SCRIPT = """
import collections, json, select, socket, sys
address = json.loads(sys.argv[1])
address = tuple(address) if isinstance(address, list) else address
family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
connects, failed, unanswered = 0, collections.Counter(), collections.Counter()
while not select.select([0], [], [], 0)[0]:
    with socket.socket(family) as client:
        client.settimeout(30)
        try:
            client.connect(address)
        except OSError as error:
            failed[type(error).__name__] += 1
            continue
        connects += 1
        try:
            client.sendall(b"hello")
            answer = client.recv(100)
            if answer != b"hello":
                unanswered["end of file" if not answer else "wrong bytes"] += 1
        except OSError as error:
            unanswered[type(error).__name__] += 1
        if len(sys.argv) > 2:  # closing with RST keeps no port in TIME_WAIT
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0] + 4 * [0]))
    if connects == 1:
        print("begun", flush=True)
print(json.dumps({"connects": connects, "failed": failed, "unanswered": unanswered}))
"""


class Load:
    """What the clients saw, complete when `with` has ended.

    failed, unanswered: how often, by error.
    """

    def __init__(self) -> None:
        self.connects = 0
        self.failed: dict[str, int] = {}
        self.unanswered: dict[str, int] = {}

    def add(self, one: dict[str, object]) -> None:
        self.connects += int(str(one["connects"]))
        for name in ("failed", "unanswered"):
            mine: dict[str, int] = getattr(self, name)
            for error, count in one[name].items():  # type: ignore[attr-defined]
                mine[error] = mine.get(error, 0) + count


@contextmanager
def load_on(
    address: object, clients: int = 2, namespace: Namespace | None = None
) -> Iterator[Load]:
    """Has so many processes connect to `address`, (host, port) or a path, meanwhile."""
    load = Load()
    command = [sys.executable, "-c", SCRIPT, json.dumps(address), "reset"]
    processes: list[subprocess.Popen[str]] = []
    timer = threading.Timer(LONGEST_S, lambda: [process.kill() for process in processes])
    timer.start()
    try:
        for _ in range(clients):
            if namespace is None:
                processes.append(_popen(command))
            else:
                with namespace:
                    processes.append(_popen(command))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        yield load
        for process in processes:
            out, _ = process.communicate(timeout=LONGEST_S)
            assert process.returncode == 0
            load.add(json.loads(out))
    finally:
        timer.cancel()
        timer.join()
        for process in processes:
            process.kill()
            process.communicate()


def _popen(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

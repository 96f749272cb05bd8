"""How fast are TIME_WAIT sockets dropped, beside `ss -K`?

    python benchmarks/drop.py [--sockets 20000] [--rounds 3]

Needs root: it works in a network namespace of its own. Each round makes the sockets anew for each
tool, A B A B. `command` is the whole process, `python` the same work within a running one. Prints
JSON: sockets per second (median of the rounds), of those that were there before and no longer
after, and how many were left. It ends with an error unless all --sockets were made.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness

from kecho import drop

CLONE_NEWNET = 0x40000000
PORT = 12345
FILTER = {"states": ["time-wait"], "peer": [f":{PORT}"]}


def enter_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # On loopback the kernel reuses a TIME_WAIT after a second, and it keeps only so many.
    for name, value in (
        ("tcp_tw_reuse", "0"),
        ("tcp_max_tw_buckets", "262144"),
        ("ip_local_port_range", "1024 65535"),
    ):
        Path("/proc/sys/net/ipv4", name).write_text(value)


def make_time_wait(listener: socket.socket, count: int) -> int:
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", PORT))
        server, _ = listener.accept()
        client.close()
        server.close()
    while drop.find(states=["last-ack", "fin-wait-1", "fin-wait-2", "closing"]):
        time.sleep(0.01)
    made = len(drop.find(**FILTER))
    if made != count:
        sys.exit(f"{made} TIME_WAIT sockets instead of {count}: ports, or tcp_max_tw_buckets?")
    return made


def run(what: str) -> int:
    """Drops them; the exit status."""
    if what == "python":
        outcomes = drop.drop(drop.find(**FILTER))
        return int(any(one.result is not drop.Result.DROPPED for one in outcomes))
    ours = [sys.executable, "-m", "kecho.drop", "--state", "time-wait", "--peer", f":{PORT}"]
    theirs = ["ss", "-K", "-t", "-n", "state", "time-wait", "dport", "=", f":{PORT}"]
    command = ours if what == "command" else theirs
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sockets", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    enter_namespace()
    listener = socket.create_server(("127.0.0.1", PORT), backlog=128)

    def measure(what: str) -> dict[str, float]:
        made = make_time_wait(listener, options.sockets)
        started = time.perf_counter()
        status = run(what)
        seconds = time.perf_counter() - started
        left = len(drop.find(**FILTER))
        drop.drop(drop.find(**FILTER))
        return {"per_s": (made - left) / seconds, "made": made, "left": left, "status": status}

    results = harness.interleaved(options.rounds, ("command", "ss -K", "python"), measure)
    figures = {
        what: {
            "sockets_per_s": round(statistics.median(one["per_s"] for one in runs)),
            "made": [one["made"] for one in runs],
            "left": [one["left"] for one in runs],
            "exit_status": [one["status"] for one in runs],
        }
        for what, runs in results.items()
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

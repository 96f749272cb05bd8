"""Clients that send and never read: what do they cost the machine?

    python benchmarks/unread.py [--clients 1 1000] [--engines epoll sockmap] [--seconds 15]

For each number of clients and each engine: a server of its own and as many clients, which send as
long as anything is taken from them, for so many seconds. Prints JSON: by how much MemAvailable
fell, for all and for each client (both sides' socket buffers are in it), what the server took in,
and its own memory. sockmap needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import socket
import time

import harness

_PIECE = bytes(1 << 16)
_MIB = 1 << 20


def _available_bytes() -> int:
    """MemAvailable: proc_meminfo(5)."""
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _send_without_reading(port: int, count: int, seconds: float) -> tuple[int, int]:
    """Returns bytes taken from the clients, and by how many MemAvailable fell at the most."""
    before, least, sent = _available_bytes(), 1 << 62, 0
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in selector.select(0.2):
                with contextlib.suppress(BlockingIOError):
                    sent += key.fileobj.send(_PIECE)
            least = min(least, _available_bytes())
    return sent, before - least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--engines", nargs="+", default=["epoll", "sockmap"])
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    figures = []
    for count in options.clients:
        for engine in options.engines:
            with harness.server("--engine", engine, "--backlog", "4096") as one:
                sent, fell = _send_without_reading(one.port, count, options.seconds)
                figures.append(
                    {
                        "clients": count,
                        "engine": engine,
                        "taken_mib": round(sent / _MIB, 1),
                        "available_fell_mib": round(fell / _MIB, 1),
                        "mib_per_client": round(fell / _MIB / count, 2),
                        "server_rss_mib": round(one.rss_bytes() / _MIB, 1),
                    }
                )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

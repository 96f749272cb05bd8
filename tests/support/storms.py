"""Clients by the thousand that mean no good, each storm a process of its own.

    python tests/support/storms.py KIND PORT COUNT SECONDS

KIND is one of KINDS. A storm ends by itself, or soon after its standard input is closed, and prints
a JSON object. A connection that the server cuts off or refuses is counted; a wrong byte ends the
process with status 1. `ping` and `stream` are no storms, but those who should not notice them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import selectors
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from support.clients import reset
from support.streams import CUT, SOURCE, Stream

CONNECT_DEADLINE_S = 10.0
REFUSED = (TimeoutError, ConnectionRefusedError, *CUT)


class Storm:
    """A storm that rages while this is open; what it prints is what wait() returns."""

    def __init__(self, kind: str, port: int, count: int = 1, seconds: float = 0) -> None:
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, str(port), str(count), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever started it
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self, deadline_s: float = 300) -> dict[str, Any]:
        """Until it ends by itself; fails if it found a wrong byte."""
        status = self._process.wait(deadline_s)
        assert status == 0, f"{self.kind}: status {status}"
        assert self._process.stdout is not None
        result: dict[str, Any] = json.loads(self._process.stdout.read())
        return result

    def stop(self, deadline_s: float = 60) -> dict[str, Any]:
        """Ends it soon."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdin = None
        return self.wait(deadline_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()


def descriptors(pid: int) -> int:
    """Open in a process: proc_pid_fd(5)."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss_bytes(pid: int) -> int:
    """Resident memory of a process: proc_pid_statm(5)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---- in the process of the storm ----------------------------------------------------------------


def told_to_end(wait_s: float = 0) -> bool:
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def connected(port: int) -> socket.socket | None:
    """None: refused, or cut off at once."""
    client = socket.socket()
    client.settimeout(CONNECT_DEADLINE_S)
    try:
        client.connect(("127.0.0.1", port))
    except REFUSED:
        client.close()
        return None
    return client


def resets(port: int, count: int, seconds: float) -> dict[str, Any]:
    """Connect and reset: SO_LINGER 0."""
    refused = 0
    for number in range(count):
        if (number % 100 == 0 or refused) and told_to_end():
            break
        client = connected(port)
        if client is None:
            refused += 1
        else:
            reset(client)
    return {"connections": number + 1 - refused, "refused": refused}


def half_open(port: int, count: int, seconds: float) -> dict[str, Any]:
    """SYNs from 10.0.0.0/8, which is to be routed into the void: prepare_half_open()."""
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for number in range(count):
            if number % 1000 == 0 and told_to_end():
                break
            source = 0x0A000001 + number
            with contextlib.suppress(BlockingIOError, OSError):
                raw.sendto(syn(source, 1024 + number % 60_000, port), ("127.0.0.1", 0))
                sent += 1
    return {"syns": sent}


def syn(source: int, source_port: int, port: int) -> bytes:
    """An IPv4 packet with a TCP header that asks for a connection to 127.0.0.1: RFC 791, 9293."""
    target = 0x7F000001
    words = [source_port, port, source >> 16, source & 0xFFFF, 0, 0, 0x5002, 64_240, 0, 0]
    total = sum(words) + (source >> 16) + (source & 0xFFFF) + (target >> 16) + (target & 0xFFFF)
    total += socket.IPPROTO_TCP + 20
    total = (total & 0xFFFF) + (total >> 16)
    words[8] = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    # The kernel fills in length and checksum: raw(7).
    header = struct.pack(">BBHHHBBHII", 0x45, 0, 40, 0, 0, 64, 6, 0, source, target)
    return header + struct.pack(">10H", *words)


def prepare_half_open(run: Callable[..., str]) -> None:
    """Has what is sent to 10.0.0.0/8 vanish: over loopback it comes back to a host that is not
    meant and does not forward. `run` runs a command in a namespace."""
    run("ip", "route", "add", "10.0.0.0/8", "dev", "lo")


def loris(port: int, count: int, seconds: float) -> dict[str, Any]:
    """A byte a second on each connection."""
    clients: dict[socket.socket, int] = {}
    refused = cut = echoed = 0
    for number in range(count):
        if (number % 100 == 0 or refused) and told_to_end():
            break
        client = connected(port)
        if client is None:
            refused += 1
        else:
            client.setblocking(False)
            clients[client] = 0
    opened = len(clients)
    end_s = time.monotonic() + seconds
    with selectors.EpollSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        round_ = 0
        while clients and time.monotonic() < end_s:
            next_s = time.monotonic() + 1
            for client in list(clients):
                try:
                    clients[client] += client.send(SOURCE[round_ : round_ + 1])
                except BlockingIOError:
                    pass
                except CUT:
                    cut += 1
                    selector.unregister(client)
                    del clients[client]
                    client.close()
            while (left_s := next_s - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    client = key.fileobj  # type: ignore[assignment]
                    try:
                        byte = client.recv(16)
                    except CUT:
                        byte = b""
                    assert byte in (b"", SOURCE[round_ : round_ + 1]), f"{byte!r} in {round_}"
                    clients[client] -= len(byte)
                    echoed += len(byte)
                    if not byte:
                        cut += 1
                        selector.unregister(client)
                        del clients[client]
                        client.close()
            if any(clients.values()):
                break  # a late one would be compared with the next round's byte
            round_ += 1
            if told_to_end():
                break
    late = sum(1 for owed in clients.values() if owed)
    for client in clients:
        reset(client)
    return {
        "connections": opened,
        "refused": refused,
        "cut": cut,
        "late": late,
        "rounds": round_,
        "bytes": echoed,
    }


def silent(port: int, count: int, seconds: float) -> dict[str, Any]:
    """Sends until there is no room, and reads nothing."""
    clients = []
    refused = sent = 0
    for _ in range(count):
        if told_to_end():
            break
        client = socket.socket()
        client.settimeout(CONNECT_DEADLINE_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        try:
            client.connect(("127.0.0.1", port))
        except REFUSED:
            client.close()
            refused += 1
            continue
        client.setblocking(False)
        clients.append(client)
    end_s = time.monotonic() + seconds
    while True:
        for client in clients:
            with contextlib.suppress(BlockingIOError, *CUT):
                sent += client.send(SOURCE[:65_536])
        if time.monotonic() > end_s or told_to_end(0.05):
            break
    for client in clients:
        client.close()  # with data unread: a reset
    return {"connections": len(clients), "refused": refused, "bytes": sent}


def ping(port: int, count: int, seconds: float) -> dict[str, Any]:
    """One message after the other, 64 bytes, until told to end or cut off; times in ms."""
    times_ns = array("q")
    client = connected(port)
    assert client is not None, "the ping-pong client was refused"
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(60)
    cut = False
    while not (len(times_ns) % 64 == 0 and told_to_end()):
        number = len(times_ns) % 100_000
        message = SOURCE[number : number + 64]
        began_ns = time.perf_counter_ns()
        try:
            client.sendall(message)
            answer = client.recv(64, socket.MSG_WAITALL)
        except CUT:
            answer = b""
        if answer != message:
            assert message.startswith(answer), "wrong bytes for the ping-pong client"
            cut = True
            break
        times_ns.append(time.perf_counter_ns() - began_ns)
    client.close()
    ordered = sorted(times_ns)
    found = {"echoes": len(ordered), "cut": cut}
    if ordered:
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0)):
            found[name] = round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6, 3)
    return found


def stream(port: int, count: int, seconds: float) -> dict[str, Any]:
    """Streams and compares every byte until told to end, which it then does, or cut off."""
    client = connected(port)
    assert client is not None, "the stream was refused"
    one = Stream(client, 1 << 62, port)
    ending = False
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    while not one.end:
        sending = one.sent < one.size and one.sent - one.received < 4 << 20
        poll.register(client, select.POLLIN | (select.POLLOUT if sending else 0))
        for fd, ready in poll.poll(1000):
            if fd != client.fileno():
                if not ending:
                    ending = True
                    poll.unregister(sys.stdin)
                    one.size = one.sent + 1  # the half-close comes with the last byte
                continue
            if ready & select.POLLOUT:
                one.send()
            if ready & ~select.POLLOUT and not one.end:
                one.receive()
    client.close()
    return {"bytes": one.received, "end": one.end}


KINDS: dict[str, Callable[[int, int, float], dict[str, Any]]] = {
    "resets": resets,
    "half-open": half_open,
    "loris": loris,
    "silent": silent,
    "ping": ping,
    "stream": stream,
}


def main() -> None:
    kind, port, count, seconds = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("begun", flush=True)
    print(json.dumps(KINDS[kind](int(port), int(count), float(seconds))))


if __name__ == "__main__":
    main()

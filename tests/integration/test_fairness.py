"""A connection that streams flat out takes its turns and leaves the others theirs."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

import kecho
from support.clients import DEADLINE_S, connect, wait_for
from support.fixture_types import StartServer

pytestmark = pytest.mark.engines

MIB = 1 << 20


# Streams faster than a server can take it: copies neither what it sends (sendfile) nor what it
# receives (MSG_TRUNC, tcp(7)), and each of the two has a process. Says how many bytes have come
# back for each line that it is sent.
STREAMER = """
import mmap, os, signal, socket, sys
port, cpu = map(int, sys.argv[1:])
usable = os.sched_getaffinity(0)
os.sched_setaffinity(0, {cpu})
client = socket.create_connection(("127.0.0.1", port))
client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
os.sched_setaffinity(0, usable)
source = os.memfd_create("source")
os.truncate(source, 1 << 20)
shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

def send():
    while True:
        os.sendfile(client.fileno(), source, 0, 1 << 20)

def receive():
    buffer = bytearray(1 << 20)
    while size := client.recv_into(buffer, 0, socket.MSG_TRUNC):
        shared[0] += size

print(0, flush=True)
children = []
for work in (send, receive):
    children.append(os.fork())
    if children[-1] == 0:
        try:
            work()
        except OSError:
            pass
        os._exit(0)
for line in sys.stdin:
    print(shared[0], flush=True)
for child in children:
    os.kill(child, signal.SIGKILL)
"""


class Streamer:
    """A process of its own, so that it is not this one that slows it down."""

    def __init__(self, port: int, cpu: int) -> None:
        """cpu: where it connects, which is how percpu chooses the worker."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", STREAMER, str(port), str(cpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_connected(self) -> None:
        assert self._answer() == 0

    def received(self) -> int:
        """Bytes that have come back so far."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(DEADLINE_S), "the streamer says nothing"
        return int(self.process.stdout.readline())

    def end(self) -> None:
        """The end of its input ends it."""
        try:
            self.process.communicate(timeout=DEADLINE_S)
        finally:
            self.process.kill()


def usable_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


@contextmanager
def streaming(port: int, count: int) -> Iterator[list[Streamer]]:
    """`count` streamers, dealt out to the CPUs, all of them under way."""
    cpus = usable_cpus()
    with ExitStack() as stack:
        streamers = []
        for number in range(count):
            streamers.append(Streamer(port, cpus[number % len(cpus)]))
            stack.callback(streamers[-1].end)
        for streamer in streamers:
            streamer.wait_until_connected()
        wait_until_more(streamers, MIB)
        yield streamers


def wait_until_more(streamers: list[Streamer], size: int) -> None:
    """Until each of them has had so many bytes more."""
    before = [streamer.received() for streamer in streamers]
    for streamer, received in zip(streamers, before, strict=True):
        wait_for(
            lambda streamer=streamer, more=received + size: streamer.received() > more,
            "the stream flows",
        )


@contextmanager
def connected_from_every_cpu(server: kecho.Server, count: int) -> Iterator[list[socket.socket]]:
    cpus = usable_cpus()
    with ExitStack() as stack:
        clients = []
        try:
            for number in range(count):
                os.sched_setaffinity(0, {cpus[number % len(cpus)]})
                clients.append(stack.enter_context(connect(server)))
        finally:
            os.sched_setaffinity(0, set(cpus))
        yield clients


def play_rounds(clients: list[socket.socket], rounds: int, deadline_s: float) -> None:
    """Ping-pong on all of them at once, until each has had so many rounds."""
    end_s = time.monotonic() + deadline_s
    played = dict.fromkeys(clients, 0)
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.sendall(b"   0")
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            assert time.monotonic() < end_s, f"rounds played: {sorted(played.values())}"
            for key, _ in selector.select(1):
                client = key.fileobj
                assert isinstance(client, socket.socket)
                assert client.recv(100) == b"%4d" % played[client]
                played[client] += 1
                if played[client] == rounds:
                    selector.unregister(client)
                else:
                    client.sendall(b"%4d" % played[client])


@pytest.mark.parametrize("threads", [1, 2])
def test_streams_leave_ping_pong_its_turns(
    start_server: StartServer, dispatch: str, threads: int
) -> None:
    server = start_server(dispatch=dispatch, threads=threads, graceful_timeout=0)
    with streaming(server.port, threads) as streamers:
        if dispatch == "percpu" and len(usable_cpus()) >= threads:
            assert [worker.active for worker in server.stats().workers] == [1] * threads
        with connected_from_every_cpu(server, 50) as clients:
            play_rounds(clients, 100, DEADLINE_S)
        wait_until_more(streamers, MIB)


def test_more_streams_than_workers_all_get_on(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, graceful_timeout=0)
    with streaming(server.port, 6) as streamers:
        for _ in range(3):
            wait_until_more(streamers, 4 * MIB)


def test_streams_spread_over_the_workers(start_server: StartServer, engine: str) -> None:
    if engine == "io_uring":
        pytest.skip(
            "a worker of io_uring keeps the connections that it accepted, all of them maybe"
        )
    server = start_server(dispatch="shared", graceful_timeout=0)
    with streaming(server.port, 4) as streamers:
        before = server.stats()
        wait_until_more(streamers, 64 * MIB)
        workers = (server.stats() - before).workers
    least, most = sorted(worker.bytes_received for worker in workers)
    assert least > most / 4


def test_streams_leave_new_clients_their_turn(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, graceful_timeout=0)
    with streaming(server.port, 4):
        for _ in range(5):
            with connected_from_every_cpu(server, 10) as clients:
                play_rounds(clients, 1, DEADLINE_S)


def test_streams_do_not_keep_the_server_from_stopping(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch)
    with streaming(server.port, 4):
        began_s = time.monotonic()
        stats = server.stop(graceful_timeout=0.5)
        assert time.monotonic() - began_s < 1.5
    assert stats.closed.total == stats.accepted == 4

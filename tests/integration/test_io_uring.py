"""--engine io_uring: what is its own. What it shares with epoll, the tests with the mark `engines`
show under both."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kecho.server._engine import Engine, try_io_uring
from support.bare_engine import OPTIONS
from support.clients import (
    DEADLINE_S,
    connect,
    connected,
    echo,
    many_descriptors,
    random_bytes,
    receive_exactly,
    reset,
    send_until_blocked,
    undelivered,
    wait_for,
)
from support.engines import needs_io_uring
from support.fixture_types import StartProcess, StartServer
from support.server_process import ServerProcess

CHUNK_BYTES = 4096  # KECHO_CHUNK_BYTES: what fills one is a stream
CHUNKS = 512  # KECHO_CHUNKS: a ring's buffers
ENTRIES = 64  # of a ring that is soon full


def rings(pid: int | str = "self") -> list[int]:
    """The descriptors of a process that are rings."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "io_uring" in os.readlink(f"/proc/{pid}/fd/{name}"):
                found.append(int(name))
    return found


@contextlib.contextmanager
def calls_counted(process: ServerProcess) -> Iterator[dict[str, int]]:
    """System calls by name that the process made meanwhile: filled in at the end."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    counts: dict[str, int] = {}
    command = [strace, "-f", "-c", "-U", "name,calls", "-p", str(process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        if "attached" not in (said := tracer.stderr.readline()):
            pytest.skip(f"strace cannot trace here: {said}")
        yield counts
        tracer.send_signal(2)
        for name, calls in re.findall(r"^(\w+)\s+(\d+)$", tracer.stderr.read(), re.M):
            counts[name] = int(calls)


def engine_with_rings(listener: socket.socket) -> Engine:
    """One worker, not started yet. The listener stays the caller's."""
    own = listener.dup()
    own.setblocking(False)
    options = OPTIONS | {
        "percpu": True,
        "buffer_bytes": 0,
        "engine": "io_uring",
        "given": (ENTRIES,),
    }
    return Engine([(own.detach(), 0, False, False)], **options)


@contextlib.contextmanager
def running_engine(listener: socket.socket) -> Iterator[Engine]:
    engine = engine_with_rings(listener)
    worker = threading.Thread(target=engine.run_worker, args=(0,))
    worker.start()
    try:
        yield engine
    finally:
        engine.stop(1000)
        worker.join(DEADLINE_S)
    assert not worker.is_alive()


# ---- who echoes ---------------------------------------------------------------------------------


@needs_io_uring
@pytest.mark.slow_under_sanitizers  # strace makes a sanitized server too slow
def test_an_echo_takes_neither_recv_nor_send(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--engine", "io_uring", "--dispatch", dispatch, "--threads", "1")
    with connected(process.port, 20) as clients:
        for client in clients:
            echo(client, b"first")
        with calls_counted(process) as counts:
            for _ in range(50):
                for client in clients:
                    client.sendall(b"x" * 64)
                for client in clients:
                    assert receive_exactly(client, 64) == b"x" * 64
    assert 0 < counts.pop("io_uring_enter") <= 2 * 1000
    assert counts.keys().isdisjoint({"recvfrom", "sendto", "epoll_ctl"}), counts


@needs_io_uring
def test_each_worker_has_a_ring_which_is_gone_after_the_stop(
    start_server: StartServer, dispatch: str
) -> None:
    before = rings()
    server = start_server(engine="io_uring", dispatch=dispatch, threads=3)
    assert len(rings()) == len(before) + 3
    assert server.engine == "io_uring"
    server.stop()
    assert rings() == before


@needs_io_uring
def test_unix_clients_are_served_beside_it(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    server = start_server(engine="io_uring", dispatch=dispatch, uds=path, port=0)
    with connect(server.port) as over_tcp, connect(path) as over_unix:
        for client in (over_tcp, over_unix):
            echo(client, random_bytes(100_000))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""


# ---- order, across all that the ring is not for -------------------------------------------------


@needs_io_uring
@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 70_000])
def test_whatever_a_message_fills_it_comes_back_and_the_end_after_it(
    start_server: StartServer, dispatch: str, size: int
) -> None:
    """A full chunk takes the connection from the ring to epoll, with more behind it."""
    server = start_server(engine="io_uring", dispatch=dispatch)
    data = random_bytes(size)
    with connect(server) as client:
        echo(client, b"in the ring")
        for _ in range(5):
            echo(client, data)
        last = data + data[:7]
        client.sendall(last)
        client.shutdown(socket.SHUT_WR)
        assert receive_exactly(client, len(last) + 1) == last
    wait_for(lambda: server.stats().closed["eof"] == 1, "the end is counted")
    stats = server.stats()
    assert stats.bytes_received == stats.bytes_sent == 11 + 5 * size + len(last)


@needs_io_uring
def test_more_clients_than_buffers_at_once(start_process: StartProcess, dispatch: str) -> None:
    """Those who find none are received from again when some have been sent."""
    arguments = ("--engine", "io_uring", "--dispatch", dispatch, "--threads", "1")
    process = start_process(*arguments, "--backlog", "4096")
    with connected(process.port, 3 * CHUNKS) as clients:
        for client in clients:
            echo(client, b"here")
        with process.paused():
            for number, client in enumerate(clients):
                client.sendall(b"%06d" % number * (number % 500 + 1))
        for number, client in enumerate(clients):
            expected = b"%06d" % number * (number % 500 + 1)
            assert receive_exactly(client, len(expected)) == expected
        for client in clients:
            echo(client, b"still here")


@needs_io_uring
def test_a_client_that_takes_every_buffer_and_does_not_read_spoils_nothing(
    start_process: StartProcess, dispatch: str
) -> None:
    arguments = ("--engine", "io_uring", "--dispatch", dispatch, "--threads", "1")
    process = start_process(*arguments)
    data = random_bytes(8 * CHUNKS * CHUNK_BYTES)
    with connect(process.port, receive_buffer=4096) as greedy, connect(process.port) as modest:
        echo(greedy, b"in the ring")
        echo(modest, b"in the ring, too")
        sending = threading.Thread(target=greedy.sendall, args=(data,))
        with process.paused():
            sending.start()
        for number in range(200):
            echo(modest, b"%d" % number)
        assert receive_exactly(greedy, len(data)) == data
        sending.join(DEADLINE_S)
        for number in range(200):
            echo(greedy, b"%d" % number)


@needs_io_uring
def test_clients_that_break_off_with_their_echo_under_way(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(engine="io_uring", dispatch=dispatch)
    for size in (1, CHUNK_BYTES, 20 * CHUNK_BYTES):
        for _ in range(50):
            client = connect(server)
            echo(client, b"in the ring")
            client.sendall(random_bytes(size))
            reset(client)
    wait_for(lambda: server.stats().active == 0, "all of them have ended")
    with connected(server, 100) as clients:
        for client in clients:
            echo(client, random_bytes(1000))
    wait_for(lambda: server.stats().active == 0, "these, too")
    stats = server.stats()
    assert sum(stats.errors.values()) == 0
    assert sum(stats.closed.values()) == stats.accepted


@needs_io_uring
def test_a_ring_that_is_full_loses_nothing() -> None:
    """More requests than it has room for are submitted in between; completions wait in the kernel
    until they are asked for."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
        running_engine(listener),
        connected(listener.getsockname()[1], 10 * ENTRIES) as clients,
    ):
        for number in range(20):
            message = b"%d" % number * (100 * number + 1)
            for client in clients:
                client.sendall(message)
            for client in clients:
                assert receive_exactly(client, len(message)) == message


@needs_io_uring
@pytest.mark.slow_under_sanitizers
def test_a_stop_with_thousands_of_idle_clients_is_soon_over(
    start_server: StartServer, dispatch: str
) -> None:
    """Each has its request taken back, and none a search through all."""
    with many_descriptors(10_500):
        server = start_server(engine="io_uring", dispatch=dispatch, threads=1, backlog=4096)
        with connected(server, 5000) as clients:
            for client in clients:
                client.sendall(b"x")
            for client in clients:
                assert client.recv(1) == b"x"
            before_s = time.process_time()
            assert server.stop().closed["drained"] == 5000
            assert time.process_time() - before_s < 2


def held_bytes(engine: Engine) -> int:
    (counted,) = engine.counters()
    return int(counted["bytes_received"] - counted["bytes_sent"])


@needs_io_uring
@pytest.mark.slow_under_sanitizers  # how much a turn holds depends on its speed
def test_what_a_client_that_does_not_read_pins_is_bounded_and_it_is_served_alone() -> None:
    """However small the share of buffers, it is not reset for what the ring had received."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with running_engine(listener) as engine:
            data = random_bytes(64 * CHUNK_BYTES) * 20
            for _ in range(8):
                with connect(listener.getsockname()[1], receive_buffer=4096) as client:
                    echo(client, b"in the ring")
                    sent = send_until_blocked(client, data, quiet_s=0.2)
                    # One go of the kernel's receives 32 chunks. Several go by before the request
                    # is cancelled if the worker has no CPU meanwhile: 60 chunks were seen.
                    assert 0 < held_bytes(engine) <= 128 * CHUNK_BYTES
                    assert receive_exactly(client, sent) == data[:sent]
            (counted,) = engine.counters()
            assert counted["closed"]["evicted"] == 0
            assert counted["backpressure"] >= 8


@needs_io_uring
def test_a_socket_with_no_room_at_all_waits_like_one_with_little() -> None:
    """Small messages fill it to the last byte: the kernel takes all of one, or nothing (EAGAIN)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with running_engine(listener) as engine:
            with connect(listener.getsockname()[1], receive_buffer=4096) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                data = random_bytes(1 << 16)
                sent, end = 0, time.monotonic() + DEADLINE_S
                while engine.counters()[0]["backpressure"] == 0 and time.monotonic() < end:
                    client.sendall(data[sent : sent + 16])
                    sent += 16
                    while undelivered(client):
                        pass
                assert 0 < sent < len(data)
                assert receive_exactly(client, sent) == data[:sent]
            wait_for(lambda: engine.counters()[0]["closed"]["eof"] == 1, "it has ended")


# ---- what a ring can do -------------------------------------------------------------------------

NOP, SENDMSG, RECV, OPENAT, SOCKET, SEND = 0, 9, 27, 18, 45, 26
POLL_ADD, ASYNC_CANCEL = 6, 14
SYS_IO_URING_ENTER, SYS_IO_URING_REGISTER = 426, 427
ENABLE_RINGS, REGISTER_FILES, GETEVENTS = 12, 2, 1


class Ring:
    """A ring of an engine that does not run yet, used in its worker's place."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        assert self.register(ENABLE_RINGS) == 0

    def register(self, what: int) -> int:
        result: int = self._call(SYS_IO_URING_REGISTER, self.fd, what, None, 0)
        return result if result >= 0 else -ctypes.get_errno()

    def submit(self, operation: int, flags: int = 0) -> int:
        """Returns what the request came to. Offsets of the rings: those of Linux 6.1 and later."""
        with (
            mmap.mmap(self.fd, ENTRIES * 64, offset=0x10000000) as requests,
            mmap.mmap(self.fd, ENTRIES * 20) as shared,
        ):
            (tail,) = struct.unpack_from("<I", shared, 4)
            (head,) = struct.unpack_from("<I", shared, 8)
            request = struct.pack("<BBHi56x", operation, flags, 0, -1)
            requests[tail % ENTRIES * 64 : tail % ENTRIES * 64 + 64] = request
            struct.pack_into("<I", shared, 4, tail + 1)
            assert self._call(SYS_IO_URING_ENTER, self.fd, 1, 1, GETEVENTS, None, 0) == 1
            _, result, _ = struct.unpack_from("<QiI", shared, 64 + head % ENTRIES * 16)
            struct.pack_into("<I", shared, 8, head + 1)
        return int(result)


@pytest.fixture
def ring(tcp: socket.socket) -> Iterator[Ring]:
    before = rings()
    engine = engine_with_rings(tcp)
    (fd,) = set(rings()) - set(before)
    yield Ring(fd)
    del engine
    assert rings() == before


@needs_io_uring
def test_a_ring_can_do_nothing_but_what_an_echo_takes(ring: Ring) -> None:
    """The sandbox does not see what a ring is asked for: io_uring_register(2), restrictions."""
    for operation in (RECV, SEND):
        assert ring.submit(operation) == -errno.EBADF
    # More than there are (EINVAL): none makes a socket, a file or a descriptor.
    for operation in set(range(128)) - {RECV, SEND, POLL_ADD, ASYNC_CANCEL}:
        assert ring.submit(operation) in (-errno.EACCES, -errno.EINVAL), operation
    for operation in (NOP, SENDMSG, OPENAT, SOCKET):
        assert ring.submit(operation) == -errno.EACCES
    fixed_file, link = 1, 4
    for flag in (fixed_file, link):
        assert ring.submit(RECV, flag) == -errno.EACCES
    assert ring.register(REGISTER_FILES) == -errno.EACCES


def test_trying_leaves_nothing_open() -> None:
    before = rings()
    with contextlib.suppress(OSError):
        try_io_uring(ENTRIES)
    assert rings() == before

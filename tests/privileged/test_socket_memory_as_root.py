"""--socket-memory beyond what the kernel gives everybody, which CAP_NET_ADMIN may have."""

from __future__ import annotations

import fcntl
import shutil
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.clients import DEADLINE_S, connect, echo, wait_for
from support.fixture_types import StartServer
from support.namespaces import Namespace
from support.privileges import skip_unless_root
from support.relay import far_apart
from support.server_process import ServerProcess
from support.sockets import served_sockets, write_and_never_read

pytestmark = pytest.mark.privileged

MIB = 1 << 20
NEEDED = 12_500_000  # bytes: 10 Gbit/s for 10 ms
SIOCOUTQNSD = 0x894B  # <linux/sockios.h>
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


def asked(one: socket.socket, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(one, request, bytes(4)))[0])


def test_the_window_and_the_send_budget_reach_12_5_megabytes(
    inside: Namespace, start_server: StartServer
) -> None:
    server = start_server(socket_memory=64 * MIB)
    assert server.socket_memory == 64 * MIB
    with connect(server) as client:
        write_and_never_read([client])
        with served_sockets(server) as (one,):
            assert asked(one, termios.FIONREAD) >= NEEDED
            assert asked(one, termios.TIOCOUTQ) >= NEEDED
    server.stop(graceful_timeout=0)


def in_flight(one: socket.socket) -> int:
    """Sent, and not acknowledged."""
    return asked(one, termios.TIOCOUTQ) - asked(one, SIOCOUTQNSD)


@pytest.mark.release
@pytest.mark.alone
@pytest.mark.parametrize("budget", [None, 64 * MIB])
def test_12_5_megabytes_are_on_their_way_each_way(
    new_namespace: Callable[[], Namespace],
    stack: ExitStack,
    start_server: StartServer,
    budget: int | None,
) -> None:
    """Over 100 ms each way. Without a budget the kernel sizes the buffers up to its own most, which
    for sending is less."""
    here, there = new_namespace(), new_namespace()
    for namespace in (here, there):
        # Without hystart, which takes the relay's jitter for a full queue.
        namespace.set("net.ipv4.tcp_congestion_control", "reno")
    try:
        stack.enter_context(far_apart({"198.51.100.1": here, "198.51.100.2": there}, 0.1))
    except OSError as error:
        pytest.skip(f"no TUN device can be made: {error}")
    with here:
        server = start_server(host="198.51.100.1", socket_memory=budget)
    with there:
        client = stack.enter_context(socket.socket())
    for name in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        client.setsockopt(socket.SOL_SOCKET, name, 64 * MIB)
    client.settimeout(DEADLINE_S)
    client.connect(("198.51.100.1", server.port))
    assert echo(client, b"x") == b"x"
    over = threading.Event()
    threads = [
        threading.Thread(target=move, args=(over, client.send, bytes(MIB))),
        threading.Thread(target=move, args=(over, client.recv, MIB)),
    ]
    for thread in threads:
        thread.start()
    most = [0, 0]

    def look() -> bool:
        with served_sockets(server) as (one,):
            most[:] = max(most[0], in_flight(client)), max(most[1], in_flight(one))
        return min(most) >= NEEDED

    try:
        if budget is not None:
            wait_for(look, "so many bytes are on their way")
        else:
            end = time.monotonic() + 8
            while time.monotonic() < end:
                look()
            assert most[1] < NEEDED
    finally:
        over.set()
        client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
    server.stop(graceful_timeout=0)


def move(over: threading.Event, call: Callable[[object], object], argument: object) -> None:
    with suppress(OSError):
        while not over.is_set():
            call(argument)


def test_without_the_capability_it_is_said_what_the_kernel_gives() -> None:
    skip_unless_root()
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv, which util-linux has")
    most = {
        name: int(Path(f"/proc/sys/net/core/{name}_max").read_text()) for name in ("rmem", "wmem")
    }
    before = [setpriv, "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"]
    with ServerProcess(["--socket-memory=2G"], before=before) as process:
        process.wait_until_listening()
        given = 2 * sum(most.values())
        assert f"socket-memory: the kernel gives {given} of {2 << 30} bytes" in process.stderr
        assert "net.core.rmem_max=536870912 net.core.wmem_max=536870912" in process.stderr
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0

"""--socket-memory: clients that write and never read pin so much of the kernel's memory."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack

import pytest

from support.clients import connect, echo, random_bytes, transfer
from support.fixture_types import StartServer
from support.sockets import served_sockets, write_and_never_read

KIB = 1024
# A segment that the kernel takes beyond each bound, of loopback's, which are the largest.
BESIDE = 2 * 65536
SO_MEMINFO = 55  # <asm-generic/socket.h>


def memory_of(one: socket.socket) -> int:
    """What is received, reserved and to be sent, with all that holds it: sk_get_meminfo()."""
    received, _, _, _, reserved, queued, *_ = struct.unpack(
        "=9i", one.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
    )
    return int(received + reserved + queued)


@pytest.mark.engines
def test_clients_that_never_read_pin_no_more_than_that(
    start_server: StartServer, dispatch: str
) -> None:
    budget = 128 * KIB
    server = start_server(dispatch=dispatch, socket_memory=budget)
    assert server.socket_memory == budget
    data = random_bytes(200_000)
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(10)]
        for client in clients[:3]:  # a stream has the kernel make its buffers as large as it may
            for _ in range(10):
                assert echo(client, data) == data
        write_and_never_read(clients)
        with served_sockets(server) as served:
            assert len(served) == len(clients)
            pinned = [memory_of(one) for one in served]
        assert budget / 2 < max(pinned) <= budget + BESIDE
        with connect(server) as other:
            assert echo(other, b"hello") == b"hello"
    assert server.stop(graceful_timeout=0).errors.total == 0


@pytest.mark.engines
def test_bytes_come_back_within_the_least(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, socket_memory=64 * KIB)
    data = random_bytes(3_000_000)
    with connect(server) as client:
        assert transfer(client, data) == data


def test_without_it_the_kernel_sizes_the_buffers(start_server: StartServer) -> None:
    server = start_server()
    assert server.socket_memory is None
    with connect(server) as client:
        write_and_never_read([client])
        with served_sockets(server) as (one,):
            assert memory_of(one) > 1 << 20
    server.stop(graceful_timeout=0)


def test_an_inherited_listener_is_given_it(start_server: StartServer, tcp: socket.socket) -> None:
    server = start_server(fd=tcp.fileno(), socket_memory=256 * KIB)
    assert server.socket_memory == 256 * KIB
    with connect(server) as client:
        write_and_never_read([client])
        with served_sockets(server) as (one,):
            assert memory_of(one) <= 256 * KIB + BESIDE
    server.stop(graceful_timeout=0)


def test_a_unix_socket_has_none(start_server: StartServer, tmp_path: object) -> None:
    server = start_server(uds=f"{tmp_path}/socket", socket_memory=64 * KIB)
    assert server.socket_memory is None

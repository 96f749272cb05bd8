"""Limits of the system: descriptors and the backlog."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import struct
import time

import pytest

import kecho
from kecho.system.sysctl import somaxconn
from support.clients import (
    answered,
    connect,
    connected,
    echo,
    receive_exactly,
    receive_until_end,
    transfer,
    wait_for,
    wait_until_delivered,
)
from support.fixture_types import StartProcess, StartServer
from support.server_process import ServerProcess, after

pytestmark = pytest.mark.engines(sanitized=True, dispatch=True)


# ---- descriptors ----------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_server_without_descriptors_waits_and_goes_on(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2", "--log-format", "json")
    room = 20
    used = len(os.listdir(f"/proc/{process.pid}/fd"))
    limit = used + room
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    with connected(process.port, 3 * room) as clients:
        for number, client in enumerate(clients):
            client.sendall(b"%4d" % number)
        wait_until_delivered(*clients)
        wait_for(lambda: len(answered(clients)) == room, "as many are served as there is room for")
        used_before_s = process.processor_time_s()
        assert len(answered(clients, within_s=0.1)) == room
        time.sleep(2)
        # 5 %, and two clock ticks; a worker that spins would use all of it.
        assert process.processor_time_s() - used_before_s < 0.05 * 2 + 0.02
        assert len(answered(clients)) == room

        everybody = dict(zip(clients, range(len(clients)), strict=True))
        while everybody:
            wait_for(lambda: answered(list(everybody)), "somebody is served")
            for client in answered(list(everybody)):
                assert receive_exactly(client, 4) == b"%4d" % everybody.pop(client)
                assert echo(client, b"more") == b"more"
                client.close()
    with connect(process.port) as client:
        assert echo(client, b"next") == b"next"
    assert process.stop() == 0
    final = json.loads(process.stderr.splitlines()[-1])["stats"]
    assert final["errors"]["descriptors"] > 0
    assert process.stderr.count("no descriptor is left for another client") == 1
    assert final["accepted"] == final["closed"]["eof"] == 3 * room + 1


@pytest.mark.e2e
def test_more_connections_than_there_are_descriptors_for_are_said_to_be_too_many(
    start_process: StartProcess, dispatch: str
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = start_process("--dispatch", dispatch, "--max-connections", str(hard))
    process.wait_until_said(rf"warning: max-connections: {hard} are more than the \d+ that RLIMIT")
    assert process.stop() == 0
    quiet = start_process("--dispatch", dispatch, "--max-connections", "100")
    assert quiet.stop() == 0
    assert "RLIMIT" not in quiet.stderr


@pytest.mark.e2e
def test_as_many_connections_as_are_said_to_be_left_are_served(
    start_process: StartProcess, dispatch: str
) -> None:
    """Though each of many workers takes an epoll set, an eventfd and sockets."""
    limit = after("resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))")
    arguments = ["--dispatch", dispatch, "--threads=24", "--udp", "--log-level=debug"]
    with ServerProcess(arguments, before=limit) as process:
        process.wait_until_listening()
        said = re.search(r"at most 256, some (\d+) connections", process.stderr)
        assert said, process.stderr
        left = int(said[1])
        assert left > 100
        with connected(process.port, left) as clients:
            assert [echo(client, b"hello") for client in clients] == [b"hello"] * left
        assert process.stop() == 0
    assert "no descriptor is left" not in process.stderr


@pytest.mark.e2e
def test_a_server_whose_descriptors_are_freed_by_somebody_else_goes_on(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    limit = len(os.listdir(f"/proc/{process.pid}/fd"))
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))
    with connect(process.port) as client:
        client.sendall(b"hello")
        assert answered([client], within_s=0.3) == []
        # No connection of the server ends: nothing but time tells it to try again.
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit + 5, hard))
        assert receive_exactly(client, 5) == b"hello"
    assert process.stop() == 0


@pytest.mark.e2e
def test_a_server_without_descriptors_still_stops(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2")
    with connect(process.port) as inside:
        assert echo(inside, b"inside") == b"inside"
        limit = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with connected(process.port, 3):
            assert echo(inside, b"still here") == b"still here"
            assert process.stop() == 0
            assert receive_until_end(inside) == b""


# ---- backlog --------------------------------------------------------------------------------


def backlogs(server: kecho.Server) -> list[int]:
    """What the kernel has in force for each listening socket of the server, found among the
    descriptors of this process: tcpi_sacked of a listener, tcp(7)."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        if "socket:" not in os.path.realpath(f"/proc/self/fd/{name}"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.family == socket.AF_INET and one.getsockname()[1] == server.port:
                assert one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                found.append(struct.unpack_from("=8x6I", info)[5])
    return found


@pytest.mark.parametrize("backlog", [0, 1, 128, 1000])
def test_the_backlog_is_in_force(start_server: StartServer, dispatch: str, backlog: int) -> None:
    server = start_server(dispatch=dispatch, backlog=backlog)
    listeners = 1 if dispatch == "shared" else 2
    assert backlogs(server) == [min(backlog, somaxconn())] * listeners


def test_a_backlog_beyond_somaxconn_is_truncated_and_said(
    start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(dispatch=dispatch, backlog=somaxconn() + 1)
    assert set(backlogs(server)) == {somaxconn()}
    assert f"net.core.somaxconn={somaxconn()}" in caplog.text.replace(" = ", "=")


def test_no_more_clients_than_the_backlog_wait(start_server: StartServer, dispatch: str) -> None:
    backlog = 5
    server = start_server(dispatch=dispatch, backlog=backlog, max_connections=1)
    listeners = 1 if dispatch == "shared" else 2
    with connect(server) as inside, contextlib.ExitStack() as stack:
        assert echo(inside, b"inside") == b"inside"
        knocking = [stack.enter_context(socket.socket()) for _ in range(40)]
        for client in knocking:
            client.setblocking(False)
            client.connect_ex(server.addresses[0])
        time.sleep(0.3)
        waiting = [client for client in knocking if is_connected(client)]
        # The kernel takes one more than it is told, and a handshake under way beside.
        assert backlog <= len(waiting) <= listeners * (backlog + 2)
        assert echo(inside, b"inside") == b"inside"


def is_connected(client: socket.socket) -> bool:
    try:
        client.getpeername()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("backlog", [0, 1])
def test_a_small_backlog_serves_clients_one_after_another(
    start_server: StartServer, dispatch: str, backlog: int
) -> None:
    server = start_server(dispatch=dispatch, backlog=backlog)
    for _ in range(20):
        with connect(server) as client:
            assert transfer(client, b"hello") == b"hello"
    assert server.stop().accepted == 20

"""A stop while clients queue, with and without the kernel's moving of queued connections."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket

import pytest

from support.clients import (
    connect,
    echo,
    plenty,
    receive_until_end,
    receive_until_reset,
    send_until_blocked,
    wait_until_delivered,
)
from support.namespaces import Namespace
from support.server_process import ServerProcess

pytestmark = [pytest.mark.privileged, pytest.mark.e2e]

QUEUED = 20


def connect_from_each_cpu(port: int, count: int) -> list[socket.socket]:
    """Under percpu every queue gets some: on loopback the SYN is handled where it is sent."""
    cpus = sorted(os.sched_getaffinity(0))
    clients = []
    try:
        for number in range(count):
            os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            clients.append(connect(port))
    finally:
        os.sched_setaffinity(0, cpus)
    return clients


@pytest.mark.parametrize("graceful_timeout", ["0.5", "5"])
@pytest.mark.parametrize("migrate", [0, 1])
def test_no_queued_client_is_lost_when_the_server_stops(
    namespace: Namespace, dispatch: str, migrate: int, graceful_timeout: str
) -> None:
    namespace.set("net.ipv4.tcp_migrate_req", migrate)
    arguments = ["--dispatch", dispatch, "--threads=2", f"--graceful-timeout={graceful_timeout}"]
    for _ in range(5):
        with namespace:
            process = ServerProcess(arguments)
        with process:
            process.wait_until_listening()
            with namespace:
                with process.paused():
                    clients = connect_from_each_cpu(process.port, QUEUED)
                    for number, client in enumerate(clients):
                        client.sendall(b"%d" % number * 1000)
                    wait_until_delivered(*clients)
                    process.process.terminate()  # it is seen together with the clients
                for number, client in enumerate(clients):
                    with client:
                        assert receive_until_end(client) == b"%d" % number * 1000
            assert process.wait() == 0
            assert f"{QUEUED} connections accepted" in process.stderr
            assert f"closed drained={QUEUED}," in process.stderr


@pytest.mark.parametrize("migrate", [0, 1])
@pytest.mark.parametrize("why", ["max_connections", "descriptors"])
def test_no_queued_client_is_lost_when_a_server_stops_that_has_no_room(
    namespace: Namespace, dispatch: str, migrate: int, why: str
) -> None:
    """Its listeners are paused: nobody accepts, and nobody would before a connection ends."""
    namespace.set("net.ipv4.tcp_migrate_req", migrate)
    arguments = ["--dispatch", dispatch, "--threads=2"]
    arguments += ["--max-connections=2"] if why == "max_connections" else []
    with namespace:
        process = ServerProcess(arguments)
    with process:
        process.wait_until_listening()
        with namespace, contextlib.ExitStack() as stack:
            inside = [stack.enter_context(connect(process.port)) for _ in range(2)]
            assert [echo(client, b"inside") for client in inside] == [b"inside"] * 2
            if why == "descriptors":
                limit = len(os.listdir(f"/proc/{process.pid}/fd"))
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            clients = connect_from_each_cpu(process.port, QUEUED)
            for number, client in enumerate(clients):
                stack.enter_context(client)
                client.sendall(b"%d" % number * 1000)
            wait_until_delivered(*clients)
            assert process.stop() == 0
            assert [receive_until_end(client) for client in inside] == [b""] * 2
            for number, client in enumerate(clients):
                assert receive_until_end(client) == b"%d" % number * 1000
    assert f"{QUEUED + 2} connections accepted" in process.stderr
    assert "are reset" not in process.stderr


def test_clients_whom_a_stop_finds_no_descriptor_for_are_counted_in_a_warning(
    namespace: Namespace, dispatch: str
) -> None:
    with namespace:
        process = ServerProcess(
            ["--dispatch", dispatch, "--threads=2", "--graceful-timeout=0.7", "--no-sandbox"]
        )
    with process:
        process.wait_until_listening()
        with namespace, contextlib.ExitStack() as stack:
            silent = stack.enter_context(connect(process.port, receive_buffer=4096))
            send_until_blocked(silent, plenty())
            # So low that those which the drain closes make no room.
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, 3))
            clients = connect_from_each_cpu(process.port, QUEUED)
            for client in clients:
                stack.enter_context(client)
                client.sendall(b"hello")
            assert process.stop() == 0
            assert [receive_until_reset(client) for client in clients] == [b""] * QUEUED
    assert process.stderr.count("are reset") == 1
    assert (
        f"warning: {QUEUED} clients that waited to be accepted when the server stopped are reset: "
        f"there was no descriptor for them until the graceful timeout (RLIMIT_NOFILE 3,"
    ) in process.stderr


def test_clients_whom_a_stop_at_once_finds_in_the_queues_are_counted_in_a_warning(
    namespace: Namespace, dispatch: str
) -> None:
    with namespace:
        process = ServerProcess(["--dispatch", dispatch, "--threads=2", "--max-connections=1"])
    with process:
        process.wait_until_listening()
        with namespace, contextlib.ExitStack() as stack:
            inside = stack.enter_context(connect(process.port))
            assert echo(inside, b"inside") == b"inside"
            clients = connect_from_each_cpu(process.port, QUEUED)
            for client in clients:
                stack.enter_context(client)
            with process.paused():
                process.send(signal.SIGINT)
                process.send(signal.SIGTERM)
            assert process.wait() == 0
    accepted = re.search(r"(\d+) connections? accepted", process.stderr)
    lost = re.search(r"(\d+) clients that waited .* are reset: .* at once", process.stderr)
    assert accepted
    assert int(accepted[1]) + (int(lost[1]) if lost else 0) == 1 + QUEUED

"""A stop while clients queue, with and without the kernel's moving of queued connections."""

from __future__ import annotations

import os
import socket

import pytest

from clients import connect, receive_until_end, wait_until_delivered
from namespaces import Namespace
from processes import ServerProcess

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

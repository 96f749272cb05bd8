"""A running server is replaced under load, by way of its listener: no connection is refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from support.clients import echo
from support.connecting_client import load_on
from support.server_process import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.engines(dispatch=True)]

ROUNDS = 4


def test_a_listener_that_is_handed_on_refuses_nobody(dispatch: str, engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        hand_on_under_load(listening, "--dispatch", dispatch, "--engine", engine)


def test_a_unix_listener_that_is_handed_on_refuses_nobody(dispatch: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen(1024)
        hand_on_under_load(listening, "--dispatch", dispatch)


def hand_on_under_load(listening: socket.socket, *options: str) -> None:
    fd = listening.fileno()
    arguments = ["--fd", str(fd), "--threads=2", *options]
    server = ServerProcess(arguments, pass_fds=[fd])
    try:
        server.wait_until_listening()
        with load_on(listening.getsockname()) as load:
            for _ in range(ROUNDS):
                successor = ServerProcess(arguments, pass_fds=[fd])
                old, server = server, successor
                with old:
                    successor.wait_until_listening()
                    assert old.stop() == 0
                    assert "Traceback" not in old.stderr
    finally:
        server.kill()
    assert load.connects > 100
    assert load.failed == {}
    assert load.unanswered == {}


def test_a_listener_of_which_nobody_serves_for_a_while_refuses_nobody(
    dispatch: str, engine: str
) -> None:
    """As a service manager restarts a service: the socket is its own, and clients wait there."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        fd = listening.fileno()
        arguments = ["--fd", str(fd), "--dispatch", dispatch, "--engine", engine]
        waiting: list[socket.socket] = []
        try:
            for _ in range(3):
                with ServerProcess(arguments, pass_fds=[fd]) as server:
                    server.wait_until_listening()
                    for client in waiting:
                        assert echo(client, b"hello") == b"hello"
                        client.close()
                    assert server.stop() == 0
                waiting = [socket.create_connection(listening.getsockname(), 30) for _ in range(20)]
        finally:
            for client in waiting:
                client.close()


def test_a_killed_holder_leaves_the_queue_to_the_other(dispatch: str, engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        fd = listening.fileno()
        arguments = ["--fd", str(fd), "--dispatch", dispatch, "--engine", engine]
        with ServerProcess(arguments, pass_fds=[fd]) as staying:
            staying.wait_until_listening()
            for _ in range(3):
                with ServerProcess(arguments, pass_fds=[fd]) as killed:
                    killed.wait_until_listening()
                    with staying.paused(), killed.paused():
                        waiting = [
                            socket.create_connection(listening.getsockname(), 30) for _ in range(20)
                        ]
                        killed.kill()
                    for client in waiting:
                        with client:
                            assert echo(client, b"hello") == b"hello"
            assert staying.stop() == 0

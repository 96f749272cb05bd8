"""A server whose listener is closed from outside says so, drains, and ends."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kecho
from kecho import drop
from support.clients import (
    DEADLINE_S,
    connect,
    connected,
    echo,
    plenty,
    receive_exactly,
    receive_until_reset,
    send_until_blocked,
    wait_for,
)
from support.fixture_types import StartServer
from support.logs import said
from support.namespaces import Namespace
from support.server_process import ServerProcess

pytestmark = pytest.mark.privileged

LOST = r"was closed from outside \(ss -K, or shutdown\(2\) by another holder\)"


def destroy_listeners(port: int, most: int = 1000, host: str = "") -> None:
    """As many as there are. The kernel looks a listener up as it would for a SYN on this CPU, and
    refuses the destroy when it finds another one of the group than was meant: from each CPU one is
    found."""
    left = most
    usable = os.sched_getaffinity(0)
    try:
        for cpu in sorted(usable):
            os.sched_setaffinity(0, {cpu})
            found = drop.find(states=["listen"], local=[f"{host}:{port}"], listeners=True)
            for one in drop.drop(found, listeners=True) if most > 1 else _one_of(found):
                left -= str(one.result) == "dropped"
            if not left:
                return
    finally:
        os.sched_setaffinity(0, usable)
    assert left < most


def _one_of(found: list[drop.Socket]) -> list[drop.Outcome]:
    for one in found:
        outcomes = drop.drop([one], listeners=True)
        if str(outcomes[0].result) == "dropped":
            return outcomes
    return []


def listening(port: int) -> int:
    return len(drop.find(states=["listen"], local=[f":{port}"], listeners=True))


def assert_lost(process: ServerProcess, clients: int) -> None:
    """It ends by itself: one line says why, and the last one what it did."""
    assert process.wait() == 1
    lines = process.stderr.splitlines()
    errors = [line for line in lines if line.startswith("kecho: error: ")]
    assert len(errors) == 1
    assert "by another holder): draining for at most" in errors[0]
    assert lines[-1].startswith("kecho: stopped after ")
    assert f"{clients} connection" in lines[-1]
    assert "Traceback" not in process.stderr


# ---- from Python --------------------------------------------------------------------------------


@pytest.mark.engines(dispatch=True)
def test_a_server_whose_listener_is_destroyed_drains_and_wait_says_why(
    inside: Namespace,
    start_server: StartServer,
    dispatch: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = start_server(dispatch=dispatch, threads=2, graceful_timeout=60)
    with connect(server) as idle, connect(server, receive_buffer=4096) as slow:
        assert echo(idle, b"before") == b"before"
        data = plenty()
        sent = send_until_blocked(slow, data)
        destroy_listeners(server.port, 1)
        assert receive_exactly(idle, 1) == b""
        slow.shutdown(socket.SHUT_WR)
        assert receive_exactly(slow, sent + 1) == data[:sent]
    with pytest.raises(kecho.ListenerLostError, match=LOST) as raised:
        server.wait(DEADLINE_S)
    assert raised.value.addresses == server.addresses
    assert isinstance(raised.value, OSError)
    assert raised.value.errno is None
    assert not server.is_running
    assert server.wait(0)  # it is said once
    stats = server.stats()
    assert stats.closed["drained"] + stats.closed["eof"] == stats.accepted == 2
    assert len(said(caplog, LOST)) == 1
    assert listening(server.port) == 0
    server.start()
    with connect(server) as client:
        assert echo(client, b"again") == b"again"


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_of_several_listeners_one_is_enough(
    inside: Namespace,
    start_server: StartServer,
    dispatch: str,
    host: str,
    tmp_path: Path,
) -> None:
    hosts = ("127.0.0.1", "::1")
    server = start_server(dispatch=dispatch, host=hosts, uds=str(tmp_path / "uds"))
    (lost,) = (at for at in server.addresses if at[0] == host.strip("[]"))
    destroy_listeners(server.port, 1, host)
    with pytest.raises(kecho.ListenerLostError, match=LOST) as raised:
        server.wait(DEADLINE_S)
    assert raised.value.addresses == (lost,)
    assert not (tmp_path / "uds").exists()


def test_a_listener_that_shares_its_port_with_another_server_is_missed(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    """The port is still served, by the other one; of this one's capacity nothing would be told."""
    first = start_server(dispatch=dispatch, reuse_port=True)
    second = start_server(dispatch=dispatch, reuse_port=True, port=first.port)
    destroy_listeners(first.port, 1)
    wait_for(lambda: first.is_running + second.is_running == 1, "one of them has ended")
    lost, left = (second, first) if first.is_running else (first, second)
    with pytest.raises(kecho.ListenerLostError):
        lost.wait(DEADLINE_S)
    with connect(left) as client:
        assert echo(client, b"served") == b"served"
    left.stop()


def test_a_stop_that_comes_after_the_loss_raises_it(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch)
    destroy_listeners(server.port)
    wait_for(lambda: not server.is_running, "it has ended")
    with pytest.raises(kecho.ListenerLostError):
        server.stop()
    assert server.stop().accepted == 0


@pytest.mark.engines
def test_a_server_that_stops_while_its_listener_is_destroyed_stops_in_order(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    for wait_s in (0.0, 0.3, 0.7):
        server = start_server(dispatch=dispatch)
        with connect(server) as client:
            assert echo(client, b"x") == b"x"
            destroy_listeners(server.port)
            time.sleep(wait_s)
            with contextlib.suppress(kecho.ListenerLostError):
                server.stop()
            assert server.stats().closed["drained"] == 1
            assert receive_exactly(client, 1) == b""


@pytest.mark.engines
def test_a_listener_that_is_destroyed_while_it_is_paused_is_missed(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_connections=1)
    with connect(server) as held, connect(server) as waiting:
        assert echo(held, b"x") == b"x"
        destroy_listeners(server.port)
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
        with pytest.raises(kecho.ListenerLostError):
            server.wait(DEADLINE_S)


def test_a_handler_of_logs_that_waits_does_not_keep_it_from_draining(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    """The watching thread logs without the lock that stop() and stats() take, and afterwards."""
    told, go_on = threading.Event(), threading.Event()

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()
            go_on.wait(DEADLINE_S)

    handler = Waits(logging.WARNING)
    logging.getLogger("kecho").addHandler(handler)
    try:
        server = start_server(dispatch=dispatch)
        destroy_listeners(server.port)
        assert told.wait(DEADLINE_S)
        assert server.stats().active == 0
        wait_for(lambda: not server.is_running, "it has ended")
    finally:
        go_on.set()
        logging.getLogger("kecho").removeHandler(handler)
    with pytest.raises(kecho.ListenerLostError):
        server.wait()


def test_what_wait_raises_can_be_sent_to_another_process() -> None:
    error = kecho.ListenerLostError((("127.0.0.1", 7),), "lost")
    again = pickle.loads(pickle.dumps(error))
    assert (again.addresses, str(again)) == ((("127.0.0.1", 7),), "lost")


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--user=nobody", "--dispatch=percpu"],
        ["--reuse-port", "--dispatch=percpu"],
        ["--udp"],
        ["--host=127.0.0.1", "--host=::1"],
    ],
    ids=["root", "nobody", "reuse-port", "udp", "two hosts"],
)
def test_a_command_whose_listener_is_destroyed_ends_with_status_1(
    inside: Namespace, options: list[str]
) -> None:
    with ServerProcess(["--threads=2", *options]) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"before") == b"before"
            destroy_listeners(process.port, 1)
            assert receive_exactly(client, 1) == b""
            assert_lost(process, 1)


def test_a_client_that_does_not_read_is_reset_at_the_drains_deadline(inside: Namespace) -> None:
    with ServerProcess(["--graceful-timeout=0.3"]) as process:
        process.wait_until_listening()
        with connect(process.port, receive_buffer=4096) as client:
            send_until_blocked(client, plenty())
            destroy_listeners(process.port)
            assert_lost(process, 1)
            receive_until_reset(client)


def test_a_signal_during_that_drain_stops_at_once_with_status_1(inside: Namespace) -> None:
    with ServerProcess(["--graceful-timeout=60"]) as process:
        process.wait_until_listening()
        with connect(process.port, receive_buffer=4096) as client:
            send_until_blocked(client, plenty())
            destroy_listeners(process.port)
            process.wait_until_said("closed from outside")
            process.send(signal.SIGTERM)
            process.wait_until_said("again to stop at once")
            process.send(signal.SIGTERM)
            assert process.wait() == 1
    assert process.stderr.count("closed from outside") == 1


def test_a_destroyed_listener_is_missed_when_no_descriptor_is_left(
    inside: Namespace, dispatch: str
) -> None:
    with ServerProcess(["--dispatch", dispatch, "--threads=2"]) as process:
        process.wait_until_listening()
        with connect(process.port) as held, contextlib.ExitStack() as stack:
            assert echo(held, b"x") == b"x"
            numbers = [int(name) for name in os.listdir(f"/proc/{process.pid}/fd")]
            limit = max(numbers) + 1
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))
            clients = stack.enter_context(connected(process.port, limit - len(numbers) + 1))
            clients[-1].sendall(b"waits")
            process.wait_until_said("no descriptor is left")
            destroy_listeners(process.port, 1)
            assert receive_exactly(held, 1) == b""
            assert process.wait() == 1
    assert process.stderr.count("closed from outside") == 1


# ---- inherited ----------------------------------------------------------------------------------


@contextlib.contextmanager
def handed_over(kind: str, path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as one:
        one.bind(str(path) if kind == "unix" else ("127.0.0.1", 0))
        one.listen(7)
        yield one


@pytest.mark.parametrize(
    ("kind", "how"), [("tcp", "destroyed"), ("tcp", "shut down"), ("unix", "shut down")]
)
def test_an_inherited_listener_that_is_lost_ends_the_server(
    inside: Namespace, kind: str, how: str, tmp_path: Path
) -> None:
    """Destroyed by somebody with the right, or shut down by whoever else has it, for all."""
    with handed_over(kind, tmp_path / "socket") as given:
        arguments = ["--fd", str(given.fileno()), "--threads=2"]
        with ServerProcess(arguments, pass_fds=[given.fileno()]) as process:
            process.wait_until_listening()
            with socket.socket(given.family) as client:
                client.connect(given.getsockname())
                client.settimeout(DEADLINE_S)
                assert echo(client, b"before") == b"before"
                if how == "destroyed":
                    destroy_listeners(given.getsockname()[1])
                else:
                    given.shutdown(socket.SHUT_RD)
                assert receive_exactly(client, 1) == b""
                assert_lost(process, 1)

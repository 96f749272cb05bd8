"""Listeners that are destroyed from outside listen again."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from kecho import drop
from kecho.cpus import usable_cpus
from support.clients import DEADLINE_S, connect, connected, echo, receive_exactly, wait_for
from support.engines import needs_sockmap
from support.fixture_types import StartServer
from support.logs import said
from support.namespaces import Namespace
from support.server_process import ServerProcess

pytestmark = pytest.mark.privileged


def destroy_listeners(port: int, most: int = 1000) -> None:
    """As many as there are. The kernel looks a listener up as it would for a SYN on this CPU, and
    refuses the destroy when it finds another one of the group than was meant: from each CPU one is
    found."""
    left = most
    usable = os.sched_getaffinity(0)
    try:
        for cpu in sorted(usable):
            os.sched_setaffinity(0, {cpu})
            found = drop.find(states=["listen"], local=[f":{port}"], listeners=True)
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


@pytest.mark.engines
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])
def test_a_destroyed_listener_listens_again_on_its_port(
    inside: Namespace,
    start_server: StartServer,
    dispatch: str,
    caplog: pytest.LogCaptureFixture,
    host: str,
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    server = start_server(dispatch=dispatch, host=host)
    address = ("::1" if ":" in host else "127.0.0.1", server.port)
    sockets = listening(server.port)
    with socket.create_connection(address, timeout=DEADLINE_S) as old:
        assert echo(old, b"before") == b"before"
        for _ in range(3):
            destroy_listeners(server.port)
            begun = time.monotonic()
            wait_for(lambda: listening(server.port) == sockets, "it listens again")
            assert time.monotonic() - begun < 3
            for _ in range(10):
                with socket.create_connection(address, timeout=DEADLINE_S) as new:
                    assert echo(new, b"after") == b"after"
            assert echo(old, b"meanwhile") == b"meanwhile"
    pattern = "was closed from outside .* listening again"  # said a moment after it is so
    wait_for(lambda: len(said(caplog, pattern)) == 3 * sockets, "all of them are told")
    stats = server.stop()
    assert stats.accepted == stats.closed["eof"] == 31
    assert stats.errors["listener"] == 3 * sockets


@pytest.mark.engines
def test_one_of_several_listeners_is_replaced_and_steering_goes_on(
    inside: Namespace, start_server: StartServer
) -> None:
    cpus = usable_cpus()
    if len(cpus) < 2:
        pytest.skip("steering by CPU needs two CPUs")
    server = start_server(dispatch="percpu", threads=2)

    def accepted_by_worker(cpu: int) -> list[int]:
        before = [one.accepted for one in server.stats().workers]
        thread = threading.Thread(target=visit, args=(cpu,))
        thread.start()
        thread.join(DEADLINE_S)
        after = [one.accepted for one in server.stats().workers]
        return [late - early for early, late in zip(before, after, strict=True)]

    def visit(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        for _ in range(10):
            with connect(server) as client:
                assert echo(client, b"x") == b"x"

    for _ in range(4):
        assert accepted_by_worker(cpus[0]) == [10, 0]
        assert accepted_by_worker(cpus[1]) == [0, 10]
        destroy_listeners(server.port, 1)
        wait_for(lambda: listening(server.port) == 2, "it listens again")
        time.sleep(0.1)  # steered anew in the same look
    destroy_listeners(server.port)
    wait_for(lambda: listening(server.port) == 2, "both listen again")
    time.sleep(0.1)
    assert accepted_by_worker(cpus[0]) == [10, 0]
    assert accepted_by_worker(cpus[1]) == [0, 10]


@pytest.mark.engines
def test_a_port_that_somebody_else_has_taken_is_waited_for(
    inside: Namespace, start_server: StartServer, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kecho")
    server = start_server(dispatch=dispatch)
    with connect(server) as old, socket.socket() as thief:
        assert echo(old, b"x") == b"x"
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        destroy_listeners(server.port)
        while True:
            with contextlib.suppress(OSError):
                thief.bind(("127.0.0.1", server.port))
                thief.listen()
                break
            if listening(server.port):
                destroy_listeners(server.port)
        wait_for(lambda: said(caplog, "cannot be listened on again: .*in use"), "it is said")
        time.sleep(1.2)
        assert len(said(caplog, "cannot be listened on again")) <= 2  # one for each listener
        assert echo(old, b"still served") == b"still served"
        thief.close()
        wait_for(lambda: said(caplog, "listening again"), "it listens once it can")
    with connect(server) as client:
        assert echo(client, b"new") == b"new"


@pytest.mark.engines
def test_a_server_whose_listener_was_destroyed_stops_in_order(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    for wait_s in (0.0, 0.3, 0.7):
        server = start_server(dispatch=dispatch)
        with connect(server) as client:
            assert echo(client, b"x") == b"x"
            destroy_listeners(server.port)
            time.sleep(wait_s)
            assert server.stop().closed["drained"] == 1
            assert receive_exactly(client, 1) == b""


@pytest.mark.parametrize("options", [[], ["--user", "nobody"]], ids=["root", "nobody"])
def test_a_command_in_its_sandbox_listens_again(
    inside: Namespace, dispatch: str, options: list[str]
) -> None:
    """Under --user and percpu all of a group have to go before the user may make it anew: the
    kernel compares the sockets' users."""
    with ServerProcess(["--dispatch", dispatch, "--threads", "2", *options]) as process:
        process.wait_until_listening()
        for _ in range(2):
            destroy_listeners(process.port)
            process.wait_until_said("listening again")
            process.stderr = process.stderr.replace("listening again", "")
            wait_for(lambda: listening(process.port) >= 1, "it listens")
            with connect(process.port) as client:
                assert echo(client, b"after") == b"after"
        assert process.stop() == 0


@pytest.mark.slow_under_sanitizers
@needs_sockmap
@pytest.mark.parametrize("options", [[], ["--user", "nobody"]], ids=["root", "nobody"])
def test_the_kernel_echoes_those_who_come_to_a_listener_that_was_made_anew(
    inside: Namespace, dispatch: str, options: list[str]
) -> None:
    arguments = ["--engine=sockmap", "--dispatch", dispatch, "--threads=2", *options]
    with ServerProcess(arguments) as process, contextlib.ExitStack() as stack:
        process.wait_until_listening()
        clients = [stack.enter_context(connect(process.port))]
        assert echo(clients[0], b"first") == b"first"  # nobody waits to be accepted any more
        for _ in range(2):
            destroy_listeners(process.port)
            process.wait_until_said("listening again")
            process.stderr = process.stderr.replace("listening again", "")
            wait_for(lambda: listening(process.port) >= 1, "it listens")
            clients += stack.enter_context(connected(process.port, 5))
            assert [echo(client, b"before") for client in clients] == [b"before"] * len(clients)
            with process.paused():  # nobody but the kernel is there
                assert [echo(client, b"x" * 5000) for client in clients] == (
                    [b"x" * 5000] * len(clients)
                )
        assert process.stop() == 0


def backlog_of(one: socket.socket) -> int:
    """tcpi_sacked of a listener: tcp(7)."""
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    backlog: int = struct.unpack_from("=8x6I", info)[5]
    return backlog


@contextlib.contextmanager
def handed_over(kind: str) -> Iterator[socket.socket]:
    """A listener as somebody else might make it, with options that kecho does not use itself."""
    family = socket.AF_INET if kind == "ipv4" else socket.AF_INET6
    with socket.socket(family) as one:
        if kind == "dual":
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if kind == "device":
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        one.bind(("127.0.0.1" if kind == "ipv4" else "::", 0))
        one.listen(7)
        yield one


def sockets_at(port: int) -> list[socket.socket]:
    """Duplicates of this process's listeners there."""
    found = []
    names = os.listdir("/proc/self/fd")
    for name in [one for one in names if "socket:" in os.path.realpath(f"/proc/self/fd/{one}")]:
        one = socket.socket(fileno=os.dup(int(name)))
        is_ours = (
            one.family != socket.AF_UNIX
            and one.getsockname()[1] == port
            and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
        if is_ours:
            found.append(one)
        else:
            one.close()
    return found


@pytest.mark.engines
@pytest.mark.parametrize("kind", ["ipv4", "dual", "device"])
def test_an_inherited_listener_that_is_destroyed_is_made_anew_as_it_was(
    inside: Namespace,
    start_server: StartServer,
    dispatch: str,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    with handed_over(kind) as given, contextlib.ExitStack() as stack:
        port = given.getsockname()[1]
        server = start_server(fd=given.fileno(), dispatch=dispatch)
        hosts = {"ipv4": ["127.0.0.1"], "dual": ["127.0.0.1", "::1"], "device": ["::1"]}[kind]
        old = stack.enter_context(socket.create_connection((hosts[0], port), DEADLINE_S))
        assert echo(old, b"before") == b"before"
        for _ in range(2):
            destroy_listeners(port)
            wait_for(lambda: listening(port) == 1, "it listens again")
            wait_for(lambda: said(caplog, "listening again"), "it is in the old one's place")
            caplog.clear()
            (again,) = (stack.enter_context(one) for one in sockets_at(port))
            assert again.getsockname() == given.getsockname()
            assert backlog_of(again) == 7
            if kind != "ipv4":
                only_v6 = again.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                assert only_v6 == (kind == "device")
            device = again.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
            assert device.rstrip(b"\0") == (b"lo" if kind == "device" else b"")
            for host in hosts:
                with socket.create_connection((host, port), DEADLINE_S) as new:
                    assert echo(new, b"after") == b"after"
            again.close()
        assert echo(old, b"meanwhile") == b"meanwhile"
        assert server.stop().errors["listener"] == 2


@pytest.mark.parametrize("options", [[], ["--user", "nobody"]], ids=["root", "nobody"])
def test_a_command_in_its_sandbox_makes_an_inherited_listener_anew(
    inside: Namespace, dispatch: str, options: list[str]
) -> None:
    with handed_over("ipv4") as given:
        arguments = ["--fd", str(given.fileno()), "--dispatch", dispatch, "--threads=2", *options]
        with ServerProcess(arguments, pass_fds=[given.fileno()]) as process:
            process.wait_until_listening()
            destroy_listeners(process.port)
            process.wait_until_said("listening again")
            with connect(process.port) as client:
                assert echo(client, b"after") == b"after"
            assert process.stop() == 0


def test_a_destroyed_listener_is_replaced_when_no_descriptor_is_left(
    inside: Namespace, dispatch: str
) -> None:
    """One after the other under percpu: with what is in reserve."""
    with ServerProcess(["--dispatch", dispatch, "--threads=2"]) as process:
        process.wait_until_listening()
        with connect(process.port) as held, contextlib.ExitStack() as stack:
            assert echo(held, b"x") == b"x"
            sockets = listening(process.port)
            numbers = [int(name) for name in os.listdir(f"/proc/{process.pid}/fd")]
            limit = max(numbers) + 1
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))
            for _ in range(limit - len(numbers) + 1):  # one more than there are descriptors for
                client = stack.enter_context(connect(process.port))
            client.sendall(b"waits")
            process.wait_until_said("no descriptor is left")
            destroy_listeners(process.port, 1)
            process.wait_until_said("listening again")
            wait_for(lambda: listening(process.port) == sockets, "it listens again")
            assert echo(held, b"y") == b"y"
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
            for _ in range(5):
                with connect(process.port) as client:
                    assert echo(client, b"after") == b"after"
        assert process.stop() == 0


def test_a_listener_whose_group_is_another_users_is_said_to_be_lost_and_why(
    inside: Namespace,
) -> None:
    if len(usable_cpus()) < 2:
        pytest.skip("needs two CPUs, or the connections go by hash to one that is left")
    arguments = ["--dispatch=percpu", "--threads=2", "--user=nobody"]
    with ServerProcess(arguments) as process:
        process.wait_until_listening()
        # The first is replaced by the socket in reserve, which was root's, too.
        destroy_listeners(process.port, 1)
        process.wait_until_said("listening again")
        wait_for(lambda: listening(process.port) == 2, "both listen")
        destroy_listeners(process.port, 1)
        process.wait_until_said(
            r"cannot be listened on again: Address already in use by sockets of uid 0, whose "
            r"SO_REUSEPORT group the kernel does not let uid \d+ join; .* restart the server"
        )
        for _ in range(20):  # by the one that is left
            with connect(process.port) as client:
                assert echo(client, b"still served") == b"still served"
        assert process.stop() == 0
    assert process.stderr.count("cannot be listened on again") == 1


@pytest.mark.engines
def test_a_listener_that_is_destroyed_while_it_is_paused_listens_again(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_connections=1)
    with connect(server) as held, connect(server) as waiting:
        assert echo(held, b"x") == b"x"
        sockets = listening(server.port)
        destroy_listeners(server.port)
        wait_for(lambda: listening(server.port) == sockets, "it listens again")
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
    with connect(server) as client:
        assert echo(client, b"after") == b"after"


def test_a_handler_of_logs_that_waits_for_the_server_does_not_stop_it(
    inside: Namespace, start_server: StartServer, dispatch: str
) -> None:
    """The watching thread logs without the lock that stop() and stats() take."""
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
        server.request_stop()
        wait_for(lambda: not server.is_running, "it has ended")
    finally:
        go_on.set()
        logging.getLogger("kecho").removeHandler(handler)
    server.wait()

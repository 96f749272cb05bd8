"""`python -m kecho`: what the system refuses is one line, and status 1."""

from __future__ import annotations

import os
import re
import socket
from contextlib import closing

import pytest

from kecho.system.sysctl import read_sysctl
from support.clients import connect, echo, free_port
from support.fixture_types import StartProcess, StartServer
from support.server_process import ServerProcess, after, assert_refused, run_command

# What the command says; what it does under the sanitizers is in test_process_life.py and others.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]


@pytest.mark.parametrize("holder", ["shared", "percpu"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_port_that_another_server_holds_is_refused(
    start_server: StartServer, dispatch: str, holder: str, threads: str
) -> None:
    held = start_server(dispatch=holder)
    finished = run_command("--port", str(held.port), "--dispatch", dispatch, "--threads", threads)
    assert_refused(finished, 1, "--port", f"{held.port} is in use")
    with connect(held) as client:
        assert echo(client, b"hello") == b"hello"


@pytest.mark.parametrize("option", ["SO_REUSEADDR", "SO_REUSEPORT"])
def test_a_port_that_a_foreign_socket_holds_is_refused(dispatch: str, option: str) -> None:
    with socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        port = foreign.getsockname()[1]
        finished = run_command("--dispatch", dispatch, "--threads=2", KECHO_PORT=str(port))
    assert_refused(finished, 1, "KECHO_PORT", f"{port} is in use")


def test_a_port_held_on_the_second_host_is_refused(
    start_server: StartServer, dispatch: str
) -> None:
    held = start_server(host="127.0.0.2", port=free_port())
    finished = run_command(
        "--host=127.0.0.1", "--host=127.0.0.2", f"--port={held.port}", "--dispatch", dispatch
    )
    assert_refused(finished, 1, "--port", f"127.0.0.2:{held.port}")


def test_reuse_port_lets_two_processes_share_a_port(
    start_process: StartProcess, dispatch: str
) -> None:
    arguments = ("--reuse-port", "--dispatch", dispatch, "--threads", "2")
    first = start_process(*arguments)
    second = start_process(*arguments, "--port", str(first.port))
    assert second.port == first.port
    # Which of the two gets a client is up to a hash; each has had one, sooner or later.
    for _ in range(200):
        with connect(first.port) as client:
            assert echo(client, b"hello") == b"hello"
    counts = []
    for process in (first, second):
        assert process.stop() == 0
        accepted = re.search(r"(\d+) connections? accepted", process.stderr)
        assert accepted, process.stderr
        counts.append(int(accepted[1]))
    assert sum(counts) == 200
    assert min(counts) > 0


def test_a_server_without_reuse_port_is_refused_beside_one_with_it(
    start_process: StartProcess, dispatch: str
) -> None:
    first = start_process("--reuse-port", "--dispatch", dispatch)
    finished = run_command("--port", str(first.port), "--dispatch", dispatch)
    assert_refused(finished, 1, "--port", "in use")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "two..dots", "x" * 64])
def test_an_unknown_host_is_refused(host: str) -> None:
    # One query and no waiting, where a name server is configured that does not answer.
    finished = run_command("--host", host, RES_OPTIONS="timeout:1 attempts:1")
    assert_refused(finished, 1, "--host", host)


def test_an_address_of_another_host_is_refused(dispatch: str) -> None:
    finished = run_command("--host=192.0.2.1", "--port=0", "--dispatch", dispatch)
    assert_refused(finished, 1, "--host", "192.0.2.1")


def test_a_privileged_port_is_refused_without_the_capability(dispatch: str) -> None:
    if (read_sysctl("net.ipv4.ip_unprivileged_port_start") or 0) <= 80:
        pytest.skip("net.ipv4.ip_unprivileged_port_start lets anybody listen on port 80")
    # root exec'ed without CAP_NET_BIND_SERVICE (10) in its bounding set, prctl(2).
    drop = "import ctypes; ctypes.CDLL(None).prctl(24, 10, 0, 0, 0)"
    before = after(drop) if os.geteuid() == 0 else []
    with ServerProcess(["--port", "80", "--dispatch", dispatch], before=before) as process:
        assert process.wait() == 1
    assert re.fullmatch(r"kecho: error: --port: .*permission.*80.*\n", process.stderr)


@pytest.mark.parametrize("descriptors", [20, 150], ids=["listeners", "queues"])
def test_too_few_descriptors_to_start_are_one_line(descriptors: int) -> None:
    limit = after(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))")
    arguments = ["--dispatch=percpu", "--threads=100", "--log-level=error"]
    with ServerProcess(arguments, before=limit) as process:
        assert process.wait() == 1
    assert re.fullmatch(r"kecho: error: .*Too many open files\n", process.stderr)


@pytest.mark.slow_under_sanitizers  # their shadow memory is more address space than the limit
def test_too_few_threads_to_start_are_one_line(dispatch: str) -> None:
    # Stacks of 1 GiB each in 4 GiB of addresses: RLIMIT_NPROC does not bind root.
    limits = (
        "resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, 1 << 30));"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))"
    )
    arguments = ["--threads=8", "--log-level=error", "--dispatch", dispatch]
    with ServerProcess(arguments, before=after(limits)) as process:
        assert process.wait() == 1
    assert re.fullmatch(r"kecho: error: .*thread.*\n", process.stderr), process.stderr


def test_a_port_is_free_again_once_its_server_has_ended(
    start_process: StartProcess, dispatch: str
) -> None:
    first = start_process("--dispatch", dispatch)
    with connect(first.port) as client:
        assert echo(client, b"hello") == b"hello"
        assert first.stop() == 0
        with closing(connect(start_process(f"--port={first.port}").port)) as other:
            assert echo(other, b"hello") == b"hello"

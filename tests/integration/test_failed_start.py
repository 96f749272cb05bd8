"""A start that fails, and what no life of a server leaves in its process."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from pathlib import Path

import pytest

import kecho
import kecho.server.run
from kecho.server.sockets import steering
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    free_port,
)
from support.fixture_types import StartServer
from support.server_process import run_python, run_script

# ---- a start that fails -------------------------------------------------------------------------


def test_a_port_in_use_leaves_nothing_behind(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    held = start_server(host="127.0.0.2", port=free_port())
    path = tmp_path / "socket"
    server = kecho.Server(
        host=["127.0.0.1", "127.0.0.2"], port=held.port, uds=path, dispatch=dispatch, threads=2
    )
    with pytest.raises(OSError, match="in use") as raised:
        server.start()
    assert isinstance(raised.value, kecho.ListenError)
    assert raised.value.errno == errno.EADDRINUSE
    assert raised.value.option == "port"
    assert not server.is_running
    assert not path.exists()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", held.port))

    held.stop()
    with server:  # the same one can be started once the port is free
        assert all(is_echoing(address) for address in server.addresses)


def is_echoing(address: object) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(DEADLINE_S)
        client.connect(address)
        return echo(client, b"hello") == b"hello"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"port": 65536}, "port"),
        ({"port": "1"}, "port"),
        ({"port": True}, "port"),
        ({"host": []}, "host"),
        ({"host": [1]}, "host"),
        ({"uds": "x" * 108}, "uds"),
        ({"backlog": -1}, "backlog"),
        ({"threads": 0}, "threads"),
        ({"dispatch": "both"}, "dispatch"),
        ({"bench": 2}, "bench"),
        ({"bench": 1, "dispatch": "shared"}, "bench"),
        ({"reuse_port": 1}, "reuse_port"),
        ({"max_connections": 0}, "max_connections"),
        ({"idle_timeout": float("nan")}, "idle_timeout"),
        ({"graceful_timeout": -1}, "graceful_timeout"),
    ],
)
def test_an_invalid_option_is_a_value_error_that_names_it(
    options: dict[str, object], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: ") as raised:
        kecho.Server(**options)
    assert isinstance(raised.value, kecho.OptionError)
    assert raised.value.option == name


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        kecho.Server(port=0, colour="blue")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"host": "192.0.2.1"}, "host"),
        ({"host": "two..dots"}, "host"),
        ({"uds": "/nonexistent/socket"}, "uds"),
    ],
)
def test_a_refused_listener_is_an_os_error_that_names_its_option(
    options: dict[str, object], name: str, dispatch: str
) -> None:
    server = kecho.Server(**options, dispatch=dispatch)
    with pytest.raises(OSError, match=name) as raised:
        server.start()
    assert isinstance(raised.value, kecho.ListenError)
    assert raised.value.option == name


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_thread_that_cannot_be_started_fails_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dispatch: str, failing: int
) -> None:
    real_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == f"kecho-{failing}":
            raise RuntimeError("can't start new thread")
        real_start(thread)

    path = tmp_path / "socket"
    server = kecho.Server(port=0, uds=path, threads=3, dispatch=dispatch)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises((OSError, RuntimeError), match="thread"):
            server.start()
    assert not server.is_running
    assert not path.exists()
    with server:
        assert is_echoing(server.addresses[0])


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers  # their shadow memory is more address space than the limit
def test_a_process_out_of_threads_fails_the_start_and_lives(dispatch: str) -> None:
    finished = run_script(
        """
        import kecho, resource, sys, threading
        threading.stack_size(1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        server = kecho.Server(port=0, threads=8, dispatch=sys.argv[1])
        try:
            server.start()
        except (OSError, RuntimeError) as error:
            print(type(error).__name__, threading.active_count(), server.is_running)
        """,
        dispatch,
        warnings="default",
    )
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(r"\w+ 1 False\n", finished.stdout)


def test_a_worker_that_cannot_be_pinned_fails_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # No CPU of that number: the system call itself refuses.
    cpus = [min(os.sched_getaffinity(0)), 1 << 15]
    monkeypatch.setattr(steering, "usable_cpus", lambda: cpus)
    path = tmp_path / "socket"
    server = kecho.Server(port=0, uds=path, threads=2, dispatch="percpu")
    with pytest.raises(OSError, match="sched_setaffinity") as raised:
        server.start()
    assert raised.value.errno == errno.EINVAL
    assert not server.is_running
    assert not path.exists()


def test_a_worker_that_cannot_be_pinned_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "usable_cpus", lambda: [1 << 15, (1 << 15) + 1])
    server = kecho.Server(port=0, threads=2, dispatch="percpu")
    with pytest.raises(OSError, match="sched_setaffinity"):
        server.start()
    assert server.wait(0)
    assert server.stop().active == 0


# ---- the descriptors of a process ---------------------------------------------------------------


@pytest.mark.e2e
def test_descriptors_are_not_inherited_by_programs(start_server: StartServer) -> None:
    server = start_server()
    with connect(server) as client:
        assert echo(client, b"hello") == b"hello"
        listed = run_python("-c", "import os; print(len(os.listdir('/proc/self/fd')))")
        assert listed.stdout == "4\n"  # 0, 1, 2 and the listing


def test_a_hundred_lives_leave_nothing(dispatch: str) -> None:
    server = kecho.Server(port=0, threads=2, dispatch=dispatch)
    for _ in range(100):
        with server:
            assert is_echoing(server.addresses[0])

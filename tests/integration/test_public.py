"""--public: limits for a server that strangers can reach, and the warning without any."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import kecho
from kecho.server.public import PUBLIC, describe_limits
from support.clients import DEADLINE_S, answered, connect, echo, many_descriptors
from support.fixture_types import StartProcess
from support.server_process import ServerProcess, after, run_command

pytestmark = pytest.mark.e2e

DESCRIPTORS = 256
IDLE = 300


@contextlib.contextmanager
def idle_connections(port: int, sources: Sequence[str]) -> Iterator[list[socket.socket]]:
    """IDLE of them, from these addresses in turn. Who is refused is left out."""
    with many_descriptors(2 * IDLE), contextlib.ExitStack() as stack:
        clients = []
        for number in range(IDLE):
            one = stack.enter_context(socket.socket())
            one.settimeout(DEADLINE_S)
            one.bind((sources[number % len(sources)], 0))
            with contextlib.suppress(ConnectionError):
                one.connect(("127.0.0.1", port))
                clients.append(one)
        yield clients


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[ServerProcess]:
    before = after(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))")
    with ServerProcess(["--host=0.0.0.0", "--backlog=512", *arguments], before=before) as server:
        server.wait_until_listening()
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.stderr


def test_idle_connections_of_one_address_shut_everybody_out_without_it() -> None:
    with serving() as server, idle_connections(server.port, ["127.0.0.9"]):
        server.wait_until_said("no descriptor is left for another client")
        with connect(server.port) as other:
            other.sendall(b"hello")
            assert answered([other], within_s=0.5) == []


def test_idle_connections_of_one_address_shut_nobody_out_with_it() -> None:
    with (
        serving("--public") as server,
        idle_connections(server.port, ["127.0.0.9"]),
        connect(server.port) as other,
    ):
        assert echo(other, b"hello") == b"hello"
    assert "no descriptor" not in server.stderr
    assert re.search(r"refused (per_address|rate)=\d+", server.stderr)


@contextlib.contextmanager
def idle_unix_connections(path: str) -> Iterator[None]:
    """IDLE of them, of one user, or as many as find room in the accept queue."""
    with many_descriptors(2 * IDLE), contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(path)
        yield


def test_idle_connections_of_a_local_user_shut_no_tcp_client_out_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with serving("--public", f"--uds={path}") as server, idle_unix_connections(path):
        for _ in range(5):
            with connect(server.port) as other:
                other.settimeout(5)
                assert echo(other, b"hello") == b"hello"
    assert "no descriptor" not in server.stderr
    assert re.search(r"refused (per_address|rate)=\d+", server.stderr)


def test_idle_connections_of_many_addresses_go_after_the_idle_timeout() -> None:
    sources = [f"127.0.1.{last}" for last in range(1, IDLE // 10 + 1)]
    with serving("--public", "--idle-timeout=1", "--rate-limit=100") as server:
        with idle_connections(server.port, sources), connect(server.port) as other:
            assert echo(other, b"hello") == b"hello"
        server.wait_until_said("no descriptor is left for another client")
    assert re.search(r" idle=\d+", server.stderr)


# ---- what it sets, and where that is told -------------------------------------------------------


def test_it_sets_what_is_not_given() -> None:
    config = kecho.ServerConfig(public=True, idle_timeout=5, rate_limit=7)
    expected = PUBLIC | {"idle_timeout": 5.0, "rate_limit": 7}
    assert {name: asdict(config)[name] for name in PUBLIC} == expected
    assert not any(asdict(kecho.ServerConfig())[name] for name in PUBLIC)


def test_a_flag_and_a_variable_win_over_it() -> None:
    finished = run_command(
        "--print-config",
        "--log-format=json",
        "--idle-timeout=5",
        KECHO_PUBLIC="1",
        KECHO_WRITE_TIMEOUT="6",
    )
    rows = json.loads(finished.stdout)
    assert rows["idle_timeout"] == {"value": 5.0, "source": "--idle-timeout"}
    assert rows["write_timeout"] == {"value": 6.0, "source": "KECHO_WRITE_TIMEOUT"}
    assert rows["rate_limit"] == {"value": PUBLIC["rate_limit"], "source": "KECHO_PUBLIC"}
    assert rows["max_connections"] == {"value": None, "source": "default"}


def test_the_start_line_and_the_help_tell_all_of_it(start_process: StartProcess) -> None:
    process = start_process("--public", "--idle-timeout=5")
    (line,) = process.stderr.splitlines()
    told = re.search(r"public: (.*?)[,)] buffers", line)
    assert told, line
    assert describe_limits(PUBLIC | {"idle_timeout": 5}) in told[1]
    assert ", sockets 512K each," in line
    assert process.stop() == 0
    shown = " ".join(run_command("--help").stdout.split())
    assert describe_limits(PUBLIC) in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"max_connections": 9, "write_timeout": 9, "rate_limit": 9, "deny": "10.0.0.0/8"}, False),
        ({"public": True}, True),
        ({"idle_timeout": 9}, True),
        ({"max_connections_per_ip": 9}, True),
        ({"allow": "10.0.0.0/8"}, True),
    ],
    ids=str,
)
def test_what_bounds_one_client(options: dict[str, Any], expected: bool) -> None:
    assert kecho.ServerConfig(**options).bounds_clients is expected


WARNING = "warning: other hosts can reach it"


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--host=0.0.0.0", "--udp"], True),
        (["--host=0.0.0.0", "--max-connections=9"], True),
        ([], False),
        (["--host=0.0.0.0", "--public"], False),
        (["--host=0.0.0.0", "--idle-timeout=9"], False),
    ],
    ids=str,
)
def test_without_limits_one_warning_names_it_and_the_server_serves(
    start_process: StartProcess, arguments: list[str], warned: bool
) -> None:
    process = start_process(*arguments)
    with connect(process.port) as client:
        assert echo(client, b"hello") == b"hello"
    assert process.stop() == 0
    assert process.stderr.count(WARNING) == process.stderr.count("--public") == int(warned)

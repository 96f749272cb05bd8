"""Clients that are turned away at accept: by prefix, by number and by rate of one address."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kecho
from support.clients import DEADLINE_S, connect, connected, echo, random_bytes, wait_for
from support.fixture_types import StartServer
from support.privileges import needs_root
from support.server_process import run_script

pytestmark = pytest.mark.engines(dispatch=True)


def client_from(server: kecho.Server, source: str) -> socket.socket:
    return socket.create_connection(
        ("127.0.0.1", server.port), timeout=DEADLINE_S, source_address=(source, 0)
    )


def is_served(server: kecho.Server, source: str) -> bool:
    try:
        with client_from(server, source) as client:
            return echo(client, b"hello") == b"hello"
    except (ConnectionResetError, BrokenPipeError):
        return False


def served(server: kecho.Server, sources: Sequence[str]) -> list[str]:
    return [source for source in sources if is_served(server, source)]


SOURCES = ["127.0.0.1", "127.0.0.2", "127.0.1.1", "127.1.0.1", "127.1.2.3", "127.255.255.254"]


@pytest.mark.parametrize(
    ("allow", "deny", "expected"),
    [
        ([], [], SOURCES),
        (["127.0.0.0/8"], [], SOURCES),
        (["127.0.0.1"], [], ["127.0.0.1"]),
        ([], ["127.0.0.1"], SOURCES[1:]),
        (["::/0"], [], []),
        (["0.0.0.0/0"], ["::/0"], SOURCES),
        (["10.0.0.0/8"], [], []),
        ([], ["0.0.0.0/0"], []),
        (["127.1.0.0/16"], ["127.1.2.0/24"], ["127.1.0.1"]),
        (["127.1.2.3/32"], ["127.0.0.0/8"], ["127.1.2.3"]),
        (
            ["127.0.0.0/16", "127.1.2.3"],
            ["127.0.0.0/30", "127.0.0.0/8"],
            ["127.0.1.1", "127.1.2.3"],
        ),
        (["127.0.0.2/31"], [], ["127.0.0.2"]),
        (["::ffff:127.0.0.0/120"], ["::1"], ["127.0.0.1", "127.0.0.2"]),
    ],
    ids=str,
)
def test_the_most_specific_prefix_decides(
    start_server: StartServer, dispatch: str, allow: list[str], deny: list[str], expected: list[str]
) -> None:
    server = start_server(dispatch=dispatch, allow=allow, deny=deny)
    assert served(server, SOURCES) == expected
    stats = server.stop()
    assert stats.accepted == len(expected)
    assert stats.refused["denied"] == len(SOURCES) - len(expected)
    assert stats.refused.total == stats.refused["denied"]
    assert stats.active == stats.errors.total == 0


def test_many_prefixes_are_searched(start_server: StartServer, dispatch: str) -> None:
    deny = [f"127.{a}.{b}.0/24" for a in range(2, 40) for b in range(0, 256, 2)]
    server = start_server(dispatch=dispatch, deny=deny)
    sources = [f"127.{a}.{b}.7" for a in (2, 17, 39) for b in (0, 1, 2, 127, 128, 253, 254, 255)]
    assert served(server, sources) == [one for one in sources if int(one.split(".")[2]) % 2]


def test_ipv6_and_ipv4_have_rules_of_their_own(start_server: StartServer, dispatch: str) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this host has no ::1")
    hosts = ["127.0.0.1", "::1"]
    for allowed in ("0.0.0.0/0", "::1"):
        server = start_server(dispatch=dispatch, host=hosts, deny=["::/0"], allow=[allowed])
        for host, is_served in (("127.0.0.1", allowed == "0.0.0.0/0"), ("::1", allowed == "::1")):
            answer = b""
            with contextlib.suppress(ConnectionError):  # noqa: SIM117
                with socket.create_connection((host, server.port), timeout=DEADLINE_S) as client:
                    answer = echo(client, b"x")
            assert answer == (b"x" if is_served else b"")
        assert server.stop().refused["denied"] == 1


def test_rules_are_not_for_unix_sockets(
    start_server: StartServer, dispatch: str, tmp_path: object
) -> None:
    path = f"{tmp_path}/socket"
    server = start_server(dispatch=dispatch, uds=path, deny=["::/0", "0.0.0.0/0"])
    with connected(path, 5) as clients:
        assert all(echo(client, b"hello") == b"hello" for client in clients)
    assert server.stop().refused.total == 0


# ---- connections of one user --------------------------------------------------------------------


def is_served_unix(path: str) -> bool:
    try:
        with connect(path) as client:
            return echo(client, b"hello") == b"hello"
    except (ConnectionResetError, BrokenPipeError):
        return False


def test_a_user_has_so_many_connections_to_a_unix_socket_at_once(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    server = start_server(
        dispatch=dispatch, uds=path, host="127.0.0.1", port=0, max_connections_per_ip=3
    )
    with contextlib.ExitStack() as stack:
        inside = [stack.enter_context(connect(path)) for _ in range(3)]
        assert all(echo(client, b"in") == b"in" for client in inside)
        assert not is_served_unix(path)
        assert is_served(server, "127.0.0.1")  # a user is no address
        inside[0].close()
        wait_for(lambda: server.stats().active == 2, "the server has seen the end")
        assert is_served_unix(path)
    stats = server.stop()
    assert stats.refused["per_address"] == 1
    assert stats.accepted == stats.closed.total == 5


def test_a_user_may_connect_so_often_to_a_unix_socket(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    server = start_server(dispatch=dispatch, uds=path, rate_limit=2)
    outcomes = [is_served_unix(path) for _ in range(20)]
    assert outcomes[:2] == [True, True]
    assert not all(outcomes)
    assert server.stop().refused["rate"] == outcomes.count(False)


@needs_root
def test_another_user_of_a_unix_socket_has_a_limit_of_its_own(
    start_server: StartServer, dispatch: str
) -> None:
    name = f"kecho-users-{os.getpid()}"
    server = start_server(dispatch=dispatch, uds=f"@{name}", max_connections_per_ip=1)
    script = """
        import os, socket, sys
        os.setresuid(65534, 65534, 65534)
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(30)
            one.connect("\\0" + sys.argv[1])
            one.sendall(b"hello")
            print(one.recv(5))
    """
    with connect(f"\0{name}") as ours:
        assert echo(ours, b"hello") == b"hello"
        assert not is_served_unix(f"\0{name}")
        finished = run_script(script, name)
        assert finished.stdout == "b'hello'\n", finished.stderr
    assert server.stop().refused.total == 1


# ---- connections of one address -----------------------------------------------------------------


def test_an_address_has_so_many_connections_at_once(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_connections_per_ip=3)
    with contextlib.ExitStack() as stack:
        inside = [stack.enter_context(client_from(server, "127.0.0.1")) for _ in range(3)]
        assert all(echo(client, b"in") == b"in" for client in inside)
        assert not is_served(server, "127.0.0.1")
        assert is_served(server, "127.0.0.2")
        assert all(echo(client, b"in") == b"in" for client in inside)
        inside[0].close()
        wait_for(lambda: server.stats().active == 2, "the server has seen the end")
        assert is_served(server, "127.0.0.1")
    stats = server.stop()
    assert stats.refused["per_address"] == 1
    assert stats.accepted == stats.closed.total == 5


def test_a_client_that_comes_back_after_the_end_is_served(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_connections_per_ip=1)
    for _ in range(500):
        with client_from(server, "127.0.0.1") as client:
            assert echo(client, b"x") == b"x"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    assert server.stop().refused.total == 0


def test_the_count_is_right_after_a_storm(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, max_connections_per_ip=4)

    def visit(number: int) -> bool:
        return is_served(server, f"127.0.0.{1 + number % 50}")

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(visit, range(1000)))
    assert sum(answers) >= 100
    wait_for(lambda: server.stats().active == 0, "all have left")
    for source in ("127.0.0.1", "127.0.0.50"):
        with contextlib.ExitStack() as stack:
            inside = [stack.enter_context(client_from(server, source)) for _ in range(4)]
            assert all(echo(client, b"in") == b"in" for client in inside)
            assert not is_served(server, source)
    stats = server.stop()
    assert stats.accepted + stats.refused["per_address"] == 1000 + 10
    assert stats.errors.total == 0


def test_more_addresses_than_are_kept_without_connections(
    start_server: StartServer, dispatch: str
) -> None:
    """The table grows, is searched and forgets; a count that went wrong would refuse somebody."""
    server = start_server(dispatch=dispatch, max_connections_per_ip=1)
    sources = [f"127.{a}.{b}.{c}" for a in range(1, 3) for b in range(20) for c in range(1, 120)]
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(client_from(server, one)) for one in sources[:1500]]
        assert all(echo(client, b"in") == b"in" for client in kept)
        for source in sources[1500:]:
            assert is_served(server, source)
        assert not is_served(server, sources[0])
        assert not is_served(server, sources[1499])
    assert server.stop().refused["per_address"] == 2


# ---- connections of one address a second --------------------------------------------------------


def test_an_address_may_open_so_many_a_second(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, rate_limit=20)
    begun = time.monotonic()
    answers = [is_served(server, "127.0.0.1") for _ in range(60)]
    took_s = time.monotonic() - begun
    assert 20 <= sum(answers) <= 20 + 20 * took_s + 1
    assert is_served(server, "127.0.0.2")
    time.sleep(0.5)
    assert sum(is_served(server, "127.0.0.1") for _ in range(5)) == 5
    stats = server.stop()
    assert stats.refused["rate"] == 60 - sum(answers)
    assert stats.accepted == sum(answers) + 6


def test_both_limits_together(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, rate_limit=2, max_connections_per_ip=1)
    with client_from(server, "127.0.0.1") as inside:
        assert echo(inside, random_bytes(100)) == random_bytes(100)
        assert not is_served(server, "127.0.0.1")
    wait_for(lambda: server.stats().active == 0, "it has left")
    # What was refused for the number of connections has not cost a token.
    assert is_served(server, "127.0.0.1")
    assert server.stop().refused["per_address"] == 1


def test_max_connections_counts_only_those_that_are_served(
    start_server: StartServer, dispatch: str
) -> None:
    server = start_server(dispatch=dispatch, max_connections=2, deny=["127.0.0.2"])
    for _ in range(10):
        assert not is_served(server, "127.0.0.2")
    with connected(server, 2) as clients:
        assert all(echo(client, b"x") == b"x" for client in clients)
    assert server.stop().accepted == 2

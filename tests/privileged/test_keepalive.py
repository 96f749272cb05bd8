"""Clients that vanish without a word, and the places that they held."""

from __future__ import annotations

import shutil
import socket

import pytest

from kecho import ServerConfig
from kecho.server.sockets.listen import open_listeners
from support.clients import DEADLINE_S, connect, echo
from support.fixture_types import StartServer
from support.logs import said
from support.namespaces import Namespace

pytestmark = [pytest.mark.privileged, pytest.mark.engines]

GONE = "127.0.0.2"  # from where nothing arrives any more


def vanish(inside: Namespace) -> None:
    if shutil.which("nft") is None:
        pytest.skip("needs nft, which nftables has")
    inside.run("nft", "add", "table", "ip", "kecho")
    chain = "{ type filter hook input priority 0; }"
    inside.run("nft", "add", "chain", "ip", "kecho", "input", chain)
    inside.run("nft", "add", "rule", "ip", "kecho", "input", "ip", "saddr", GONE, "drop")


def test_a_client_that_vanished_does_not_keep_its_place(
    inside: Namespace, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(max_connections=1, keepalive=1)
    with socket.create_connection(server.addresses[0], DEADLINE_S, (GONE, 0)) as gone:
        assert echo(gone, b"x") == b"x"
        vanish(inside)
        with connect(server) as waiting:
            assert echo(waiting, b"y") == b"y"
        assert len(said(caplog, "--max-connections 1 is reached")) == 1
    assert server.stop().closed["timed_out"] == 1


SETTINGS = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"max_connections": 5}, [60, 12, 5]),
        ({"max_connections_per_ip": 5}, [60, 12, 5]),
        ({"keepalive": 3}, [3, 1, 5]),
        ({"max_connections": 5, "keepalive": 0}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("inherited", [False, True])
def test_keepalive_is_on_where_a_limit_on_connections_is(
    options: dict[str, int], expected: list[int] | None, inherited: bool, tcp: socket.socket
) -> None:
    where = {"fd": tcp.fileno()} if inherited else {"port": 0}
    (listener,) = open_listeners(ServerConfig.from_options({**options, **where}), 1)
    try:
        is_on = listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert bool(is_on) == (expected is not None)
        if expected is not None:
            found = [listener.socket.getsockopt(socket.IPPROTO_TCP, name) for name in SETTINGS]
            assert found == expected
    finally:
        listener.close()

"""Where it listens: families, several hosts, TCP and a Unix socket at once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import kecho
from support.clients import (
    connect,
    echo,
    random_bytes,
    receive_exactly,
    send_around_urgent,
    transfer,
)
from support.fixture_types import StartServer

pytestmark = pytest.mark.engines


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6_loopback(), reason="there is no ::1 here")


def exchange_through_each_address(server: kecho.Server) -> None:
    for number, address in enumerate(server.addresses):
        payload = random_bytes(200_000, seed=number)
        with connect(address) as client:  # type: ignore[arg-type]
            assert transfer(client, payload) == payload


@needs_ipv6
def test_bytes_come_back_over_ipv6(start_server: StartServer, dispatch: str) -> None:
    server = start_server(host="::1", dispatch=dispatch)
    with connect(server) as client:
        assert client.family == socket.AF_INET6
        assert echo(client, b"six") == b"six"
        expected = send_around_urgent(client)
        assert receive_exactly(client, len(expected)) == expected
    exchange_through_each_address(server)


def test_several_hosts_are_served_at_once(start_server: StartServer, dispatch: str) -> None:
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    server = start_server(host=hosts, dispatch=dispatch)
    assert server.addresses == tuple((host, server.port) for host in hosts)
    exchange_through_each_address(server)
    assert server.stop().closed["eof"] == 3


@needs_ipv6
def test_both_families_are_served_at_once(start_server: StartServer, dispatch: str) -> None:
    server = start_server(host=("127.0.0.1", "::1"), dispatch=dispatch)
    assert [address[0] for address in server.addresses] == ["127.0.0.1", "::1"]
    assert len({address[1] for address in server.addresses}) == 1
    exchange_through_each_address(server)


def test_tcp_and_a_unix_socket_are_served_at_once(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    server = start_server(uds=str(tmp_path / "s"), port=0, dispatch=dispatch)
    assert len(server.addresses) == 2
    exchange_through_each_address(server)


def test_a_host_that_is_not_named_is_not_served(start_server: StartServer, dispatch: str) -> None:
    server = start_server(host="127.0.0.2", dispatch=dispatch)
    with pytest.raises(ConnectionRefusedError):
        connect(server.port)
    with connect(server) as client:
        assert echo(client, b"here") == b"here"


@needs_ipv6
def test_an_address_in_brackets_is_the_address(start_server: StartServer) -> None:
    server = start_server(host="[::1]")
    assert server.addresses[0][0] == "::1"
    exchange_through_each_address(server)


@pytest.mark.parametrize("host", ["127.0.0.1:80", "[::1]:80", "nobody.invalid:80"])
def test_a_port_in_a_host_is_pointed_to_its_option(host: str) -> None:
    with pytest.raises(kecho.ListenError, match=r"host: .*the port is an option of its own"):
        kecho.Server(host=host, port=0).start()


@needs_ipv6
def test_an_ipv4_address_in_ipv6_form_is_refused_in_words() -> None:
    with pytest.raises(kecho.ListenError, match=r"host: .*: 127\.0\.0\.9 is the same"):
        kecho.Server(host="::ffff:127.0.0.9", port=0).start()

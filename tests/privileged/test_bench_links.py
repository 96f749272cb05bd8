"""Link-local addresses, of the server and of the client."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import kecho
from kecho import OptionError, bench
from kecho.bench import Workload
from support.namespaces import Namespace
from support.privileges import needs_root

pytestmark = [pytest.mark.privileged, needs_root]


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("host", ["fe80::1%lo5", "fd00::1"])
def test_a_link_local_address_is_connected_from(
    inside: Namespace, start_server: Callable[..., kecho.Server], host: str, udp: bool
) -> None:
    inside.run("ip", "link", "add", "lo5", "type", "veth", "peer", "name", "lo6")
    for address in ("fe80::1/64", "fe80::2/64", "fd00::1/64"):
        inside.run("ip", "address", "add", address, "dev", "lo5", "nodad")
    for name in ("lo5", "lo6"):
        inside.run("ip", "link", "set", name, "up")
    server = start_server(host="::", **({"udp": True, "udp_rate": 0} if udp else {}))
    workload = Workload(
        host=host,
        port=server.port,
        mode="closed",
        udp=udp,
        connections=4,
        duration=0.2,
        source="fe80::1%lo5,fe80::2%lo5",
    )
    result = bench.run(workload)
    assert not result.errors
    assert result.connections == 4
    assert result.echoes > 0


def test_a_link_that_is_not_there_is_refused(inside: Namespace) -> None:
    with pytest.raises(OptionError, match="there is no link 'lo7'"):
        bench.run(Workload(source="fe80::1%lo7"))

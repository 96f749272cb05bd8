"""SYNs whose sender never completes the handshake, from a namespace with raw sockets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.clients import connect, echo, wait_for
from support.namespaces import Namespace
from support.server_process import ServerProcess
from support.storms import Storm, descriptors, prepare_half_open, rss_bytes

pytestmark = [pytest.mark.privileged, pytest.mark.e2e, pytest.mark.timeout(600)]

IS_SANITIZED = "KECHO_EXPECT_BUILD" in os.environ
COUNT = 100_000 // (50 if IS_SANITIZED else 1)
STALL_MS = 5_000


def half_open(namespace: Namespace) -> int:
    """Sockets in SYN_RECV, 03: proc_net(5)."""
    with namespace:
        rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[3] == "03" for row in rows)


@pytest.mark.parametrize("syncookies", [0, 1])
def test_a_storm_of_half_open_connections_is_not_noticed(
    namespace: Namespace,
    dispatch: str,
    syncookies: int,
    record_property: Callable[[str, object], None],
) -> None:
    prepare_half_open(namespace.run)
    namespace.set("net.ipv4.tcp_syncookies", syncookies)
    namespace.set("net.ipv4.tcp_synack_retries", 3)  # 15 s, longer than the storm
    arguments = ["--dispatch", dispatch, "--threads=2", "--backlog=1024", "--log-format=json"]
    with namespace:
        process = ServerProcess(arguments)
    with process:
        process.wait_until_listening()
        with namespace:
            before = descriptors(process.pid)
            with Storm("ping", process.port) as ping:
                wait_for(lambda: descriptors(process.pid) == before + 1, "it is connected")
                with Storm("half-open", process.port, COUNT // 10) as storm:
                    assert storm.wait()["syns"] == COUNT // 10
                rss_before = rss_bytes(process.pid)
                with Storm("half-open", process.port, COUNT) as storm:
                    assert storm.wait()["syns"] == COUNT
                assert half_open(namespace) > 500
                figures = {"storm": f"{COUNT} half-open, {dispatch}", **ping.stop()}
            record_property("ping_pong", json.dumps(figures))
            print(json.dumps(figures))
            assert figures["echoes"] > 0
            assert not figures["cut"]
            assert figures["max_ms"] < STALL_MS
            if syncookies:  # without, the queue is full until they time out
                with connect(process.port) as client:
                    assert echo(client, b"still here") == b"still here"
        wait_for(lambda: descriptors(process.pid) == before, "the descriptors are closed")
        assert IS_SANITIZED or rss_bytes(process.pid) <= 1.1 * rss_before
        assert process.stop() == 0
    stats = json.loads(process.stderr.splitlines()[-1])["stats"]
    assert stats["accepted"] == sum(stats["closed"].values()) == 1 + syncookies
    assert not sum(stats["errors"].values())

"""The probe is the workload's own first message, on its own first connection."""

from __future__ import annotations

import pytest

from kecho import bench
from kecho.bench import Result, TargetError, Workload
from support import faulty_servers

OPENED_FIRST = ["closed", "open", "stream", "idle"]


def measure(peer: faulty_servers.Peer, **options: object) -> Result:
    more = {"rate": 100.0} if options.get("mode") == "open" else {}
    defaults = {"mode": "closed", "connections": 1, "duration": 0.5, **more}
    return bench.run(Workload(**{**defaults, "port": peer.port, **options}))


@pytest.mark.parametrize("mode", OPENED_FIRST)
def test_a_server_for_one_connection_is_measured_on_it(mode: str) -> None:
    with faulty_servers.serves_one() as peer:
        result = measure(peer, mode=mode)
    assert not result.errors
    assert result.echoes > 0
    assert result.connections == result.latency["connect"].count == peer.accepted == 1


@pytest.mark.parametrize("mode", OPENED_FIRST)
def test_a_server_that_echoes_whole_records_is_measured_by_records(mode: str) -> None:
    with faulty_servers.echoes_records(512) as peer:
        result = measure(peer, mode=mode, length=512, connections=3)
        assert not result.errors
        assert result.echoes > 0
        with pytest.raises(TargetError, match=r"did not echo a message within 0\.1 s"):
            measure(peer, mode=mode, length=64, timeout=0.1)


@pytest.mark.parametrize("processes", [1, 2])
def test_no_more_connections_are_made_than_were_asked_for(processes: int) -> None:
    with faulty_servers.delays(0) as peer:
        result = measure(peer, connections=4, processes=processes)
    assert not result.errors
    assert peer.accepted == result.connections == 4


def test_what_connects_for_each_message_has_a_connection_for_the_probe() -> None:
    with faulty_servers.echoes_records(512) as peer:
        result = measure(peer, mode="burst", connections=3, rounds=2, length=512)
    assert result.echoes == 6
    assert peer.accepted == 7


def test_a_long_first_message_is_read_while_it_is_sent() -> None:
    with faulty_servers.delays(0) as peer:
        result = measure(peer, length=1 << 24)
    assert not result.errors


@pytest.mark.parametrize("mode", [*OPENED_FIRST, "burst", "connect"])
def test_without_a_probe_nothing_else_is_sent(mode: str) -> None:
    with faulty_servers.delays(0) as peer:
        more = {"rounds": 1} if mode == "burst" else {}
        result = measure(peer, mode=mode, connections=3, probe=False, **more)
    assert not result.errors
    assert peer.accepted == result.connections
    assert result.observed["others_cpu_share"] is not None  # it is known to be on this host


def test_without_a_probe_a_server_that_is_none_is_an_error_of_the_run() -> None:
    with faulty_servers.greets(b"220 ready\r\n") as peer:
        result = measure(peer, connections=2, probe=False)
    assert sum(result.errors.values()) == 2

"""--reconnect: a server that ends connections is measured all the same."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest

from kecho import OptionError, bench
from kecho.bench import Result, Workload
from support import faulty_servers
from support.server_process import run_python

LENGTH = 64
MODES: list[dict[str, Any]] = [{"mode": "closed"}, {"mode": "open", "rate": 200.0}]


def measure(peer: faulty_servers.Peer, **options: Any) -> Result:
    defaults = {"reconnect": True, "connections": 3, "duration": 0.5, "length": LENGTH}
    return bench.run(Workload(**{**defaults, "port": peer.port, **options}))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("by_reset", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_connections_that_the_server_ends_are_opened_anew(
    options: dict[str, Any], by_reset: bool, processes: int
) -> None:
    with faulty_servers.ends_after(3, LENGTH, by_reset=by_reset) as peer:
        result = measure(peer, processes=processes, **options)
        accepted = peer.accepted
    assert not result.errors
    assert not result.partial
    assert result.observed["unanswered"] == 0
    reconnects = result.observed["reconnects"]
    assert reconnects > 0
    assert result.connections == accepted == 3 + reconnects
    assert any("ended by the server and opened anew" in note for note in result.verdict.notes)
    if options["mode"] == "open":
        assert result.echoes == 100


def test_without_the_option_it_is_an_error() -> None:
    with faulty_servers.ends_after(3, LENGTH) as peer:
        result = measure(peer, mode="closed", reconnect=False)
    assert sum(result.errors.values()) == 3
    assert result.partial


def test_an_end_in_the_middle_of_a_reply_is_an_error_all_the_same() -> None:
    with faulty_servers.closes_after(LENGTH * 3) as peer:
        result = measure(peer, mode="closed")
    assert result.errors == {"short": 3}


def test_a_server_that_ends_every_connection_without_a_reply_is_not_stormed() -> None:
    """The probe is answered, and nothing else is."""
    with faulty_servers.ends_after(1, LENGTH) as peer, faulty_servers.closes_at_once() as closing:
        result = measure(closing, mode="closed", probe=False, connections=1, timeout=0.3)
        assert closing.accepted < 150  # every 10 ms
        answered = measure(peer, mode="closed", connections=1)
    assert result.echoes == 0
    assert result.observed["unanswered"] == 1
    assert result.errors == {"timeout": 1}
    assert not result.verdict.valid
    assert answered.echoes > 0


@pytest.mark.parametrize("options", MODES)
def test_the_timeout_is_of_the_message_and_not_of_the_connection_that_it_is_sent_on(
    options: dict[str, Any],
) -> None:
    with faulty_servers.closes_at_once() as peer:
        begun_s = time.monotonic()
        result = measure(peer, probe=False, duration=60.0, timeout=0.3, **options)
    assert time.monotonic() - begun_s < 30
    assert result.errors == {"timeout": 3}
    assert result.partial


def test_a_message_that_is_answered_late_on_the_way_is_no_timeout() -> None:
    """Each is answered within the timeout; all of them take longer."""
    with faulty_servers.ends_after(1, LENGTH) as peer:
        result = measure(peer, mode="closed", depth=4, connections=2, duration=1.0, timeout=0.5)
    assert not result.errors
    assert result.observed["unanswered"] == 0


@pytest.mark.parametrize("last_s", ["0.2", "10"])
def test_a_server_that_answers_nothing_is_exit_status_1(last_s: str) -> None:
    with faulty_servers.closes_at_once() as peer:
        finished = run_python(
            *("-m", "kecho.bench", f":{peer.port}", "--reconnect", "--no-probe", "-c", "1"),
            *("--mode", "closed", "-d", last_s, "--timeout", "0.4"),
        )
    assert finished.returncode == 1, finished.stdout


def test_connects_follow_each_other_every_10_ms() -> None:
    with faulty_servers.closes_at_once() as peer:
        measure(peer, mode="closed", probe=False, connections=1, duration=1.0, timeout=5.0)
        gaps_s = sorted(after - before for before, after in pairwise(peer.accepted_at_s))
    assert gaps_s[len(gaps_s) // 4] < 0.04  # of some, whatever else runs here


def test_after_the_probes_reply_the_next_connection_is_made_at_once() -> None:
    def longest_ns() -> int:
        with faulty_servers.ends_after(1, LENGTH) as peer:
            result = measure(peer, mode="closed", connections=1, duration=0.05)
        service = result.latency.get("service")  # none in so short a time, on a busy machine
        return service.max if service else 1 << 63

    assert any(longest_ns() < 10_000_000 for _ in range(20))


def test_a_server_that_is_gone_is_an_error() -> None:
    with faulty_servers.ends_after(2, LENGTH) as peer:
        peer.most = 3
        result = measure(peer, mode="closed", timeout=0.5)
    assert result.observed["unanswered"] == 3


def test_it_is_for_closed_and_open_loops() -> None:
    with pytest.raises(OptionError, match="is for mode closed or open"):
        Workload(reconnect=True, mode="stream")

"""A rate is over the time in which messages were sent, and not over the waiting for the last."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kecho import bench
from kecho.bench import Result, Workload
from kecho.bench.results import condition
from kecho.bench.results.search import find_rate
from support import faulty_servers

LENGTH = 64
DELAY_S = 0.1


def measure(peer: faulty_servers.Peer, **options: object) -> Result:
    defaults = {"mode": "closed", "connections": 100, "threads": 2, "duration": 0.5}
    return bench.run(Workload(**{**defaults, "port": peer.port, "length": LENGTH, **options}))


def test_an_open_loop_is_not_slower_for_replies_that_come_after_the_end() -> None:
    with faulty_servers.delays(DELAY_S) as peer:
        result = measure(peer, mode="open", rate=500.0)
    assert result.echoes == 250
    assert result.duration_s == 0.5
    assert result.rate_per_s == 500
    assert not any("were asked for" in reason for reason in result.verdict.reasons)


@pytest.mark.slow_under_sanitizers
def test_a_constant_delay_of_most_of_the_time_is_no_lag() -> None:
    def lags() -> bool:
        with faulty_servers.delays(0.4) as peer:
            result = measure(peer, mode="open", rate=400.0, connections=200)
        assert result.echoes == 200
        return any("were asked for" in reason for reason in result.verdict.reasons)

    assert not all(lags() for _ in range(10))  # on a busy machine the delay is not constant


@pytest.mark.parametrize("options", [{}, {"warmup": 0.5}, {"connections": 2, "processes": 2}])
def test_a_server_that_answers_after_the_end_has_not_kept_up(options: dict[str, object]) -> None:
    with faulty_servers.delays(0.005) as peer:
        result = measure(
            peer,
            **{"mode": "open", "rate": 1000.0, "depth": 1, "connections": 1, **options},
            timeout=10.0,
        )
    assert result.echoes == 500
    assert not result.errors
    owed = result.observed["owed"]
    assert 0 < result.observed["owed_half"] < owed
    said = f"did not keep up: {owed:,} messages were still owed at the end"
    assert any(said in reason for reason in result.verdict.reasons)


def test_a_rate_at_which_replies_lag_ever_more_is_not_held() -> None:
    workload = Workload(mode="open", rate=1000.0, connections=1, depth=1, duration=0.5, timeout=10)
    with faulty_servers.delays(0.005) as peer:

        def run_at(rate: float) -> Result:
            one = bench.run(replace(workload, port=peer.port, rate=rate))
            return replace(one, observed={**one.observed, "interrupted": True})

        found = find_rate(run_at, condition.parse("p50<5s"), 1000.0)
    assert not found.results[0].errors
    assert found.rate is None


def test_a_rate_is_found_where_every_reply_takes_long() -> None:
    workload = Workload(mode="open", rate=400.0, connections=100, threads=2, duration=0.25)
    with faulty_servers.delays(DELAY_S) as peer:
        limit = condition.parse("p50<5s")
        # One step up and back is enough: how fast the peer is, is not asked.
        results: list[Result] = []

        def run_at(rate: float) -> Result:
            results.append(bench.run(replace(workload, port=peer.port, rate=rate)))
            one = results[-1]
            return replace(one, observed={**one.observed, "interrupted": True})

        found = find_rate(run_at, limit, 400.0)
    assert found.rate == 400.0


@pytest.mark.parametrize("mode", ["closed", "connect"])
def test_a_connection_whose_last_reply_is_late_costs_the_rate_of_the_others_nothing(
    mode: str,
) -> None:
    with faulty_servers.delays_the_second(1.0) as peer:
        result = measure(peer, mode=mode, connections=5, duration=0.3)
    assert not result.errors
    assert result.duration_s == 0.3
    assert result.latency[result.main_latency or ""].max >= 1e9  # and yet it is in the figures


def test_a_message_that_outlasts_the_time_is_no_contradiction_of_littles_law() -> None:
    with faulty_servers.delays(0.4) as peer:
        result = measure(peer, connections=5, duration=0.6)
    assert result.echoes == 10
    assert not any("Little" in reason for reason in result.verdict.reasons)
    # Of each connection's two messages of 0.4 s in 0.6 s, and in full figures nonetheless.
    assert any("lies beyond the end" in note for note in result.verdict.notes)


def test_after_a_warmup_as_much_is_carried_in_as_out() -> None:
    with faulty_servers.delays(0.1) as peer:
        result = measure(peer, connections=5, duration=1.05, warmup=0.55)
    assert not any("beyond the end" in note for note in result.verdict.notes)


@pytest.mark.parametrize("options", [{}, {"mode": "open", "rate": 500.0}, {"mode": "connect"}])
def test_bytes_are_those_of_the_echoes(options: dict[str, object]) -> None:
    with faulty_servers.delays(DELAY_S) as peer:
        result = measure(peer, connections=20, duration=0.15, **options)
    assert result.echoes >= 20
    assert result.bytes_sent == result.bytes_received == LENGTH * result.echoes
    assert result.bytes_per_s == pytest.approx(LENGTH * result.rate_per_s)


def test_the_series_ends_when_sending_does() -> None:
    with faulty_servers.delays_the_second(1.0) as peer:
        result = measure(peer, connections=5, duration=0.3)
    last = result.series[-1]
    assert last.start_s + last.duration_s == pytest.approx(0.3)
    assert sum(one.echoes for one in result.series) < result.echoes


def test_connections_that_are_held_have_no_rate() -> None:
    with faulty_servers.delays(0) as peer:
        result = measure(peer, mode="idle", connections=10, duration=0.1)
    assert result.echoes == 10
    assert (result.rate_per_s, result.bytes_per_s) == (0, 0)

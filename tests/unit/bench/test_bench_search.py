"""The search for the highest rate that holds."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kecho.bench import Histogram, Result, Verdict
from kecho.bench.results import condition
from kecho.bench.results.result import dump
from kecho.bench.results.search import find_rate, least_rate
from support.faultless_run import result

pytestmark = pytest.mark.python_only


def server_that_holds_up_to(capacity: float, hiccups: int = 0) -> Callable[[float], Result]:
    left = [hiccups]

    def run_at(rate: float) -> Result:
        slow = rate > capacity
        if not slow and left[0]:
            left[0] -= 1
            slow = True
        count = max(1, round(rate))
        return result([5_000_000 if slow else 10_000], echoes=count, duration_s=count / rate)

    return run_at


@pytest.mark.parametrize("capacity", [3.0, 900.0, 1000.0, 123_456.0])
@pytest.mark.parametrize("hiccups", [0, 1])
def test_the_search_closes_in_on_the_highest_rate_that_holds(capacity: float, hiccups: int) -> None:
    found = find_rate(
        server_that_holds_up_to(capacity, hiccups), condition.parse("p99<1ms"), 1000.0
    )
    assert found.rate is not None
    assert capacity / 1.06 <= found.rate <= capacity
    assert (found.held, found.tried) == (5, 5)
    assert 0.6 < found.least_share < 0.7
    assert "confirmed in 5 of 5 runs" in found.text()


def test_a_rate_that_held_by_luck_has_to_prove_itself() -> None:
    tried: dict[float, int] = {}

    def run_at(rate: float) -> Result:
        tried[rate] = tried.get(rate, 0) + 1
        slow = rate > 1000 or (rate > 700 and tried[rate] > 1)  # from 700 on, only the first holds
        count = round(rate)
        return result([5_000_000 if slow else 10_000], echoes=count, duration_s=count / rate)

    found = find_rate(run_at, condition.parse("p99<1ms"), 500.0)
    assert found.rate is not None
    assert 600 < found.rate <= 700
    assert (found.held, found.tried) == (5, 5)
    assert json.loads(dump(list(found.results), found.to_dict()))["found"]["held"] == 5


def test_a_limit_that_never_holds_is_said() -> None:
    found = find_rate(server_that_holds_up_to(0.0), condition.parse("p99<1ms"), 1000.0)
    assert found.rate is None
    assert "does not hold even at" in found.text()


def test_a_search_says_what_speaks_against_the_runs_that_it_rests_on() -> None:
    def run_at(rate: float) -> Result:
        late = Histogram.of([9_000_000] * 1000)
        slow = rate > 1000
        times = Histogram.of([10_000_000 if slow else 10_000] * 1000)
        count = round(rate)
        return result(
            echoes=count,
            duration_s=count / rate,
            latency={"response": times, **({"lateness": late} if slow else {})},
            verdict=Verdict() if slow else Verdict(("other processes took 30%",)),
        )

    found = find_rate(run_at, condition.parse("p99<1ms"), 1000.0)
    assert any("other processes took 30%" in reason for reason in found.reasons)
    assert any("the client sent late, by 9.0 of 10.0 ms" in reason for reason in found.reasons)
    assert "NOT VALID" in found.text()
    assert found.to_dict()["reasons"] == list(found.reasons)


def test_a_search_goes_no_lower_than_there_are_samples() -> None:
    limit = condition.parse("p99<1ms")
    assert least_rate(limit, 2.0) == pytest.approx(500.0)
    rates: list[float] = []

    def run_at(rate: float) -> Result:
        rates.append(rate)
        return result([5_000_000] * 2000, echoes=2000, duration_s=2000 / rate)

    found = find_rate(run_at, limit, 4000.0, 500.0)
    assert found.rate is None
    assert min(rates) == 500.0


def test_an_interruption_ends_the_search() -> None:
    interrupted = result(observed={"interrupted": True})
    found = find_rate(lambda _: interrupted, condition.parse("p99<1ms"), 1000.0)
    assert len(found.results) == 1

"""Results: as JSON, hostile or damaged, and merged."""

from __future__ import annotations

import base64
import json
import zlib
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho.bench import Histogram, Result, Verdict, Workload
from kecho.bench.output import report
from kecho.bench.results.result import dump, load
from kecho.bench.results.rounds import Round
from kecho.bench.results.series import Interval, Series
from support.faultless_run import result

pytestmark = pytest.mark.python_only


def full_result() -> Result:
    return result(
        errors={"reset": 2},
        first_error="reset: connection 1",
        partial=True,
        verdict=Verdict(("why",), ("note",)),
        series=(Interval.of(0.0, 1.0, 5, 320, Histogram.of([5, 6])),),
        rounds=(Round((1, 2), (3, 0), (4, 2**63)),),
        observed={"lost": None},
    )


def test_a_result_comes_back_from_json_as_it_was() -> None:
    one = full_result()
    assert Result.from_json(one.to_json()) == one
    assert load(dump([one])) == [one]
    assert load(dump([one, result()])) == [one, result()]


def test_repeats_come_back_from_json_with_their_rounds() -> None:
    merged = Result.merge([full_result(), full_result()])
    assert len(merged.rounds) == 2
    assert Result.from_json(merged.to_json()) == merged


def test_json_has_what_the_schema_names() -> None:
    data = json.loads(full_result().to_json())
    assert data["schema"] == "kecho.bench/1"
    assert data["verdict"]["valid"] is False
    names = "workload environment started_at duration_s connections echoes rate_per_s bytes_per_s"
    assert data.keys() >= {*names.split(), "errors", "partial", "verdict", "latency_ns"}
    figures = "count mean stddev min p50 p90 p99 p99.9 p99.99 max hdr"
    assert data["latency_ns"]["service"].keys() == set(figures.split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"schema": "kecho.bench/2"}',
        '{"schema": "kecho.bench/1"}',
        '{"schema": "kecho.bench/1", "results": 5}',
        '{"schema": "kecho.bench/1", "results": [5]}',
    ],
)
def test_what_is_no_result_is_a_value_error_of_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        load(text)


def changed(**changes: Any) -> str:
    """A full result as JSON, with top-level members changed."""
    return json.dumps({**json.loads(full_result().to_json()), **changes})


def packed(size: int) -> str:
    return base64.b64encode(zlib.compress(bytes(size))).decode()


@cache
def hostile_texts() -> dict[str, str]:
    workload = json.loads(full_result().to_json())["workload"]
    times = {"connect_ns": packed(8), "first_echo_ns": packed(8), "response_ns": packed(8)}
    half = base64.b64encode(zlib.compress(bytes(800))[:-6]).decode()
    bomb = [dict.fromkeys(times, packed(1 << 27))] * 3
    return {
        "an empty workload": changed(workload={}),
        "no connections": changed(workload={**workload, "connections": None}),
        "connections that are text": changed(workload={**workload, "connections": "5"}),
        "an unknown mode": changed(workload={**workload, "mode": "x"}),
        "a long host": changed(workload={**workload, "host": "a" * 10_000}),
        "a long source": changed(workload={**workload, "source": ["a" * 10_000]}),
        "a long date": changed(started_at="9" * 10_000),
        "an unknown latency": changed(latency_ns={"x": {"hdr": Histogram().encode()}}),
        "reasons that are numbers": changed(verdict={"reasons": [1, 2], "notes": []}),
        "no results": '{"schema": "kecho.bench/1", "results": []}',
        "text for a time": changed(observed={"open_s": "x"}),
        "deep nesting": "[" * 200_000,
        "not a number": changed(duration_s=float("nan")),
        "infinity": changed(duration_s=float("inf")),
        "a negative duration": changed(duration_s=-1.0),
        "negative echoes": changed(echoes=-1),
        "echoes that are true": changed(echoes=True),
        "times of different numbers": changed(rounds=[{**times, "connect_ns": packed(16)}]),
        "half a number": changed(rounds=[{**times, "connect_ns": packed(7)}]),
        "truncated samples": changed(rounds=[dict.fromkeys(times, half)]),
        "more samples than there is memory for": changed(rounds=bomb),
        "repeats of repeats": changed(repeats=[json.loads(changed(repeats=[json.loads("{}")]))]),
    }


@pytest.mark.parametrize("what", hostile_texts())
def test_a_hostile_file_is_refused_in_one_line(what: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$"):
        load(hostile_texts()[what])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e999", "5e-324", "1e-200", "9" * 400])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("duration_s", "duration_s"),
        ("echoes", "echoes"),
        ("observed", "observed.open_s"),
        ("repeats", r"repeats\[3\].series\[0\].start_s"),
    ],
)
def test_a_number_that_nobody_has_measured_is_refused_by_its_name(
    name: str, field: str, number: str
) -> None:
    value: Any = "PLACE"
    if name == "observed":
        value = {"open_s": value}
    elif name == "repeats":
        one = json.loads(full_result().to_json())
        value = [one] * 3 + [{**one, "series": [{**one["series"][0], "start_s": value}]}]
    text = changed(**{name: value}).replace('"PLACE"', number)
    with pytest.raises(ValueError, match=rf"^a malformed result: {field} is [^\n]*$"):
        load(text)


def test_what_a_later_version_adds_to_a_workload_is_left_out() -> None:
    workload = json.loads(full_result().to_json())["workload"]
    (one,) = load(changed(workload={**workload, "colour": "red"}))
    assert one == full_result()


def test_an_idle_result_without_a_time_to_open_is_shown() -> None:
    workload = Workload(mode="idle", connections=1).to_dict()
    assert "held" in report.text(result(workload=workload, observed={"open_s": None}))


def test_a_long_series_is_joined_without_loss() -> None:
    series = Series()
    times = [Histogram.of([1000 + second, 5_000_000]) for second in range(1000)]
    for second, one in enumerate(times):
        series.append(Interval.of(float(second), 1.0, 2, 128, one))
    intervals = series.intervals()
    assert 150 <= len(intervals) <= 300
    assert sum(one.echoes for one in intervals) == 2000
    assert sum((one.latency for one in intervals), Histogram()) == sum(times, Histogram())
    end = 0.0
    for one in intervals:
        assert one.start_s == end
        end += one.duration_s
    assert end == 1000.0
    assert max(one.duration_s for one in intervals) < 20
    assert all(isinstance(one.hdr, str) for one in intervals)  # what is kept is encoded


@given(st.data())
def test_a_damaged_result_is_a_value_error(data: st.DataObject) -> None:
    document = json.loads(full_result().to_json())
    name = data.draw(st.sampled_from(sorted(document)))
    document[name] = data.draw(
        st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"service": {}})
    )
    try:
        Result.from_dict(document)
    except ValueError:
        pass


times = st.lists(st.integers(0, 10**10), min_size=1)


@given(times, times)
def test_two_results_merged_give_the_percentiles_of_all_samples(
    one: list[int], other: list[int]
) -> None:
    merged = Result.merge([result(one), result(other)])
    together = Histogram.of([*one, *other])
    assert merged.latency["service"] == together
    assert merged.echoes == len(one) + len(other)
    through_json = Result.merge(
        [Result.from_json(result(one).to_json()), Result.from_json(result(other).to_json())]
    )
    for percent in (0, 50, 90, 99, 99.9, 100):
        assert through_json.latency["service"].percentile(percent) == together.percentile(percent)


def test_the_rates_of_simultaneous_results_add_up_those_of_repeats_do_not() -> None:
    one = result()
    assert Result.merge([one, one]).rate_per_s == one.rate_per_s
    assert Result.merge([one, one], simultaneous=True).rate_per_s == 2 * one.rate_per_s
    with pytest.raises(ValueError, match="no result"):
        Result.merge([])

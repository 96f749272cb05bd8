from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kecho.bench.results.buckets import (
    COUNTS_LENGTH,
    HIGHEST,
    highest_equivalent,
    index_of,
    lowest_equivalent,
    median_equivalent,
)
from kecho.bench.results.histogram import Histogram
from support.histograms import HISTOGRAM, LONG_MAX, VALUE, VALUES, exact_rank, theirs

pytestmark = pytest.mark.python_only

END = 2**42  # the first value without a bucket
SOME_VALUES = st.lists(VALUE, min_size=1, max_size=200)
PERCENT = st.one_of(
    st.sampled_from([0, 0.1, 1, 12.5, 25, 50, 90, 99, 99.9, 99.99, 99.999, 100]),
    st.floats(0, 100),
)


# ---- buckets ----------------------------------------------------------------------------------


def test_buckets_adjoin_and_their_bounds_have_their_index() -> None:
    expected = 0
    for index in range(COUNTS_LENGTH):
        lowest, highest = lowest_equivalent(index), highest_equivalent(index)
        assert lowest == expected
        assert lowest <= median_equivalent(index) <= highest
        assert index_of(lowest) == index_of(highest) == index
        assert (highest - lowest) * 1024 <= lowest
        expected = highest + 1
    assert expected == END


@given(st.integers(0, END - 1))
def test_a_value_lies_in_its_bucket(value: int) -> None:
    index = index_of(value)
    assert lowest_equivalent(index) <= value <= highest_equivalent(index)


def test_buckets_are_those_of_the_package() -> None:
    histogram = theirs()
    assert histogram.counts_len == COUNTS_LENGTH
    for index in range(0, COUNTS_LENGTH, 7):
        value = lowest_equivalent(index)
        assert histogram.get_value_from_index(index) == value
        assert histogram.get_counts_array_index(highest_equivalent(index)) == index
        assert histogram.get_highest_equivalent_value(value) == highest_equivalent(index)
        assert histogram._hdr_median_equiv_value(value) == median_equivalent(index)


@pytest.mark.parametrize("value", [-1, END, 2**64])
def test_a_value_without_a_bucket(value: int) -> None:
    reason = rf"^a value in ns must be 0 to {END - 1} \(got {value}\)$"
    with pytest.raises(ValueError, match=reason):
        index_of(value)


@pytest.mark.parametrize("index", [-1, COUNTS_LENGTH])
@pytest.mark.parametrize("function", [lowest_equivalent, highest_equivalent, median_equivalent])
def test_an_index_without_a_bucket(function: object, index: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^the index of a bucket must be 0 to 33791 \(got {index}\)$"
    ):
        function(index)


# ---- making one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({-1: 1}, "the index of a bucket must be 0 to 33791 (got -1)"),
        ({5: 1, COUNTS_LENGTH: 1}, "the index of a bucket must be 0 to 33791 (got 33792)"),
        ({COUNTS_LENGTH: 0}, "the index of a bucket must be 0 to 33791 (got 33792)"),
        ({5: 1, 6: -2}, "a count is negative: -2"),
        ({5: LONG_MAX, 6: 1}, f"more than {LONG_MAX} samples"),
    ],
)
def test_counts_out_of_range(counts: dict[int, int], reason: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        Histogram(counts)
    assert str(raised.value) == reason


def test_zeros_are_dropped_and_the_order_does_not_matter() -> None:
    histogram = Histogram({9: 1, 5: 0, 2: 3})
    assert list(histogram.counts.items()) == [(2, 3), (9, 1)]
    assert histogram == Histogram({2: 3, 9: 1})
    assert hash(histogram) == hash(Histogram({2: 3, 9: 1}))
    assert histogram != Histogram({2: 3})
    assert histogram != {2: 3, 9: 1}


def test_a_histogram_does_not_change() -> None:
    counts = {5: 1}
    histogram = Histogram(counts)
    counts[5] = 2
    assert histogram.counts == {5: 1}
    with pytest.raises(TypeError):
        histogram.counts[5] = 2  # type: ignore[index]
    with pytest.raises(AttributeError):
        histogram.count = 2  # type: ignore[misc]


def test_values_above_the_range_count_as_its_end() -> None:
    assert Histogram.of([HIGHEST + 1, 10**30]) == Histogram({index_of(HIGHEST): 2})


def test_a_negative_value() -> None:
    with pytest.raises(ValueError, match=r"^a value in ns must be .* \(got -1\)$"):
        Histogram.of([1, -1])


def test_an_empty_histogram() -> None:
    empty = Histogram()
    assert not empty
    assert empty == Histogram.of([]) == Histogram({5: 0}) == Histogram.decode(empty.encode())
    assert (empty.count, empty.min, empty.max, empty.mean, empty.stddev) == (0, 0, 0, 0.0, 0.0)
    assert empty.percentile(0) == empty.percentile(50) == empty.percentile(100) == 0
    assert empty.count_above(0) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("histogram", [Histogram(), Histogram.of([1, 5, 10**9])])
def test_histograms_can_be_copied(histogram: Histogram, duplicate: object) -> None:
    assert histogram.percentile(50) == duplicate(histogram).percentile(50)
    assert duplicate(histogram) == histogram


def test_repr() -> None:
    assert repr(Histogram.of([7, 2048])) == "<Histogram of 2 samples, 7 to 2049 ns>"


# ---- figures, against the sorted samples ------------------------------------------------------


@given(SOME_VALUES, PERCENT)
@example([*range(1, 1001)], 99.9)  # 99.9 / 100 * 1000 is 999.0000000000001 in floats
@example([*range(1, 51)], 14)  # and 14 / 100 * 50 is 7.000000000000001
def test_a_percentile_is_the_bucket_of_the_sample_at_its_rank(
    values: list[int], percent: float
) -> None:
    exact = sorted(values)[exact_rank(percent, len(values)) - 1]
    percentile = Histogram.of(values).percentile(percent)
    assert percentile == highest_equivalent(index_of(exact))
    assert 0 <= percentile - exact <= exact / 1024


@given(SOME_VALUES)
def test_extremes_and_count_are_those_of_the_samples(values: list[int]) -> None:
    histogram = Histogram.of(values)
    assert histogram
    assert histogram.count == len(values)
    assert histogram.min == lowest_equivalent(index_of(min(values)))
    assert histogram.max == highest_equivalent(index_of(max(values)))
    assert histogram.percentile(100) == histogram.max
    assert histogram.percentile(0) == highest_equivalent(index_of(min(values)))


@given(SOME_VALUES)
def test_mean_and_deviation_are_close_to_those_of_the_samples(values: list[int]) -> None:
    histogram = Histogram.of(values)
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    # Half of the widest bucket; a sample in the middle of two is off by all of that.
    assert histogram.mean == pytest.approx(mean, rel=1.000001 / 2048)
    # Each sample is off by at most 1/2048 of itself, so the deviation by that of the largest.
    assert histogram.stddev == pytest.approx(deviation, abs=1.000001 * max(values) / 2048)


@given(VALUES, st.integers(0, 2 * END))
def test_count_above_is_of_the_buckets_above(values: list[int], value: int) -> None:
    histogram = Histogram.of(values)
    bucket = index_of(min(value, END - 1))
    assert histogram.count_above(value) == sum(index_of(sample) > bucket for sample in values)
    for sample in values:
        expected = sum(index_of(other) > index_of(sample) for other in values)
        assert histogram.count_above(sample) == expected


def test_count_above_a_negative_value() -> None:
    with pytest.raises(ValueError, match=r"^a value in ns must be .* \(got -1\)$"):
        Histogram().count_above(-1)


@pytest.mark.parametrize("percent", [-0.1, 100.1, math.nan, math.inf])
def test_what_is_not_a_percentage(percent: float) -> None:
    with pytest.raises(ValueError, match=r"^a percentage must be 0 to 100 \(got .*\)$"):
        Histogram.of([1]).percentile(percent)


# ---- arithmetic -------------------------------------------------------------------------------


@given(VALUES, VALUES, PERCENT)
def test_merging_is_as_one_histogram_of_all_samples(
    one: list[int], other: list[int], percent: float
) -> None:
    both = Histogram.of(one) + Histogram.of(other)
    assert both == Histogram.of(one + other)
    assert hash(both) == hash(Histogram.of(one + other))
    assert both.percentile(percent) == Histogram.of(one + other).percentile(percent)
    assert both - Histogram.of(other) == Histogram.of(one)
    assert not both - both


@given(SOME_VALUES, VALUES)
def test_only_an_earlier_snapshot_can_be_subtracted(lacking: list[int], values: list[int]) -> None:
    later = Histogram.of(values)
    with pytest.raises(ValueError, match=r"^only an earlier snapshot can be subtracted$"):
        later - (later + Histogram.of(lacking))


def test_arithmetic_is_among_histograms() -> None:
    with pytest.raises(TypeError):
        Histogram() + 1
    with pytest.raises(TypeError):
        Histogram() - 1


# ---- summary ----------------------------------------------------------------------------------


def test_summary() -> None:
    histogram = Histogram.of(range(1, 1001))
    assert histogram.summary() == {
        "count": 1000,
        "mean": 500.5,
        "stddev": 288.7,
        "min": 1,
        "p50": 500,
        "p90": 900,
        "p99": 990,
        "p99.9": 999,
        "p99.99": 1000,
        "max": 1000,
        "hdr": histogram.encode(),
    }


@given(HISTOGRAM)
def test_a_summary_is_read_back_from_json(histogram: Histogram) -> None:
    assert Histogram.from_summary(json.loads(json.dumps(histogram.summary()))) == histogram


@pytest.mark.parametrize("summary", [{}, {"hdr": None}, {"hdr": 5}, {"hdr": b""}, {"hdr": "?"}])
def test_a_summary_without_a_histogram(summary: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^a summary without a histogram|is not base64"):
        Histogram.from_summary(summary)

"""Histograms to try, and the same ones of the package hdrh."""

from __future__ import annotations

import math
from fractions import Fraction

from hdrh.histogram import HdrHistogram
from hypothesis import strategies as st

from kecho.bench.results.buckets import COUNTS_LENGTH, HIGHEST, LOWEST, SIGNIFICANT_DIGITS
from kecho.bench.results.histogram import Histogram

LONG_MAX = 2**63 - 1


# Of every magnitude alike: most of a plain range would be of the last two.
VALUE = st.builds(lambda value, shift: value >> shift, st.integers(0, HIGHEST), st.integers(0, 42))


VALUES = st.lists(VALUE, max_size=200)


INDEX = st.integers(0, COUNTS_LENGTH - 1)


HISTOGRAM = st.builds(
    Histogram, st.dictionaries(INDEX, st.one_of(st.integers(1, 300), st.integers(1, 2**50)))
)


def exact_rank(percent: float, count: int) -> int:
    return max(1, math.ceil(Fraction(str(percent)) * count / 100))


def theirs(values: list[int] | None = None) -> HdrHistogram:
    """What the package has for the same samples."""
    histogram = HdrHistogram(LOWEST, HIGHEST, SIGNIFICANT_DIGITS)
    for value in values or []:
        assert histogram.record_value(value)
    return histogram

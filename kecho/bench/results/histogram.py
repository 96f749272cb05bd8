"""Latency histograms that keep three significant digits, in HdrHistogram's buckets.

Source of the definitions of mean, deviation and percentile rows: the reference implementation,
https://github.com/HdrHistogram/HdrHistogram (AbstractHistogram.java, PercentileIterator.java).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import Any

from . import hdr
from .buckets import (
    BUCKETS,
    HIGHEST,
    HIGHEST_WITH_BUCKET,
    SUB_BUCKETS,
    check_index,
    highest_equivalent,
    index_of,
    lowest_equivalent,
    medians,
)

__all__ = ["BEYOND", "Histogram"]

BEYOND = 10  # samples that have to lie beyond a percentile for it to mean something

_MOST = 2**63 - 1  # samples: the limit of a signed long in the other implementations
_NS_PER_MS = 1_000_000
_TICKS_PER_HALF_DISTANCE = 5


class Histogram:
    """Count samples, in ns, by bucket. A histogram is immutable.

    ``one + other`` has the samples of both, ``later - earlier`` those that came between two
    snapshots. A histogram without samples is false, and its figures are 0.
    """

    def __init__(self, counts: Mapping[int, int] = MappingProxyType({})) -> None:
        """Make a histogram from counts by the index of the bucket, in any order.

        Zeros are dropped. Raises ValueError if an index, a count or the sum of the counts is out
        of range.
        """
        if counts:
            check_index(min(counts))
            check_index(max(counts))
            if min(counts.values()) < 0:
                raise ValueError(f"a count is negative: {min(counts.values())}")
        indices = array("H", sorted(index for index, count in counts.items() if count))
        self._hold(indices, [counts[index] for index in indices])

    def _hold(self, indices: array[int], values: list[int]) -> None:
        """Store ascending indices and their counts, without zeros.

        A bucket takes ten bytes, where a dict takes a hundred: a result may have thousands of
        histograms.
        """
        self._count = sum(values)
        if self._count > _MOST:
            raise ValueError(f"more than {_MOST} samples")
        self._indices, self._values = indices, array("Q", values)

    @classmethod
    def of(cls, values: Iterable[int]) -> Histogram:
        """Make a histogram from samples in ns. Samples above HIGHEST count as HIGHEST.

        Raises ValueError if a sample is negative.
        """
        return cls(Counter(index_of(min(value, HIGHEST)) for value in values))

    def __add__(self, other: Histogram) -> Histogram:
        if not isinstance(other, Histogram):
            return NotImplemented
        counts = dict(self.counts)
        for index, count in other.counts.items():
            counts[index] = counts.get(index, 0) + count
        return Histogram(counts)

    def __sub__(self, earlier: Histogram) -> Histogram:
        """Return the samples since `earlier`. Raise ValueError if it has others than this one."""
        if not isinstance(earlier, Histogram):
            return NotImplemented
        counts = dict(self.counts)
        for index, count in earlier.counts.items():
            counts[index] = counts.get(index, 0) - count
            if counts[index] < 0:
                raise ValueError("only an earlier snapshot can be subtracted")
        return Histogram(counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return self._indices == other._indices and self._values == other._values

    def __hash__(self) -> int:
        return hash((self._indices.tobytes(), self._values.tobytes()))

    def __bool__(self) -> bool:
        return self._count > 0

    def __repr__(self) -> str:
        return f"<Histogram of {self._count} samples, {self.min} to {self.max} ns>"

    @cached_property
    def _running_totals(self) -> array[int]:
        """For each index, in order, how many samples there are up to its bucket, inclusive."""
        return array("Q", accumulate(self._values))

    @property
    def counts(self) -> Mapping[int, int]:
        """The counts above 0 by the index of the bucket, in ascending order."""
        return MappingProxyType(dict(zip(self._indices, self._values, strict=True)))

    @property
    def count(self) -> int:
        """The number of samples."""
        return self._count

    @property
    def min(self) -> int:
        """The lowest value of the first bucket with samples, in ns; 0 without samples."""
        return lowest_equivalent(self._indices[0]) if self else 0

    @property
    def max(self) -> int:
        """The highest value of the last bucket with samples, in ns; 0 without samples."""
        return highest_equivalent(self._indices[-1]) if self else 0

    @cached_property
    def _sums(self) -> tuple[int, int]:
        """The sum of the samples and of their squares, exactly, by the medians of their buckets."""
        values = list(map(medians().__getitem__, self._indices))
        totals = list(map(mul, self._values, values))
        return sum(totals), sum(map(mul, totals, values))

    @property
    def mean(self) -> float:
        """The mean in ns, by the medians of the buckets; 0 without samples."""
        return self._sums[0] / self._count if self else 0.0

    @property
    def stddev(self) -> float:
        """The standard deviation of the samples in ns, by the medians of the buckets.

        It is that of these samples, not an estimate for more; 0 without samples.
        """
        if not self:
            return 0.0
        total, squares = self._sums
        return math.sqrt((self._count * squares - total * total) / self._count**2)

    def percentile(self, percent: float) -> int:
        """Return the value, in ns, that `percent` % of the samples do not exceed.

        It is the highest value of the bucket of the sample with rank ceil(percent / 100 * count),
        counted from 1; for 0 % of the first sample. `percent` is taken as it is written: 99.9 is
        exactly 999/1000. Returns 0 without samples. Raises ValueError unless `percent` is 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentage must be 0 to 100 (got {percent})")
        if not self:
            return 0
        rank = max(math.ceil(Fraction(repr(float(percent))) * self._count / 100), 1)
        return highest_equivalent(self._indices[bisect_left(self._running_totals, rank)])

    def is_reliable(self, percent: float) -> bool:
        """Return whether at least BEYOND samples lie beyond a percentile."""
        return self._count * (100 - percent) / 100 >= BEYOND - 1e-9

    def count_above(self, value: int) -> int:
        """Return how many samples are in buckets above that of `value`, in ns.

        Raises ValueError if it is negative.
        """
        bucket = index_of(min(value, HIGHEST_WITH_BUCKET))
        at = bisect_right(self._indices, bucket)
        return self._count - (self._running_totals[at - 1] if at else 0)

    # ---- other forms ------------------------------------------------------------------------

    def encode(self) -> str:
        """Return the histogram in HdrHistogram's compressed V2 encoding, in base64."""
        return hdr.encode(self._indices, self._values)

    @classmethod
    def decode(cls, text: str) -> Histogram:
        """Make a histogram from what encode() returned.

        Another implementation may have encoded it, with the same range and digits. Raises
        ValueError, with a reason of one line, for anything else.
        """
        decoded = cls.__new__(cls)
        decoded._hold(*hdr.decode(text))
        return decoded

    def to_hgrm(self) -> str:
        """Return the percentile distribution as text, in ms, for HdrHistogram's plotter.

        Values have six decimals, that is whole nanoseconds; the reference implementation has three.
        """
        lines = [
            f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}",
            "",
        ]
        lines.extend(self._percentile_rows())
        mean, deviation, highest = (
            f"{ns / _NS_PER_MS:12.6f}" for ns in (self.mean, self.stddev, self.max)
        )
        lines += [
            f"#[Mean    = {mean}, StdDeviation   = {deviation}]",
            f"#[Max     = {highest}, Total count    = {self._count:12d}]",
            f"#[Buckets = {BUCKETS:12d}, SubBuckets     = {SUB_BUCKETS:12d}]",
        ]
        return "\n".join(lines) + "\n"

    def _percentile_rows(self) -> Iterator[str]:
        """Yield a row for each level that a bucket reaches, five to each halving of what remains.

        The share of samples above a level is (2 * 5 - tick) / (2 * 5) / 2**halvings. It is compared
        in integers, so that rounding neither skips nor repeats a level.
        """
        ticks = 2 * _TICKS_PER_HALF_DISTANCE
        halvings = tick = 0
        for index, running_total in zip(self._indices, self._running_totals, strict=True):
            value = highest_equivalent(index) / _NS_PER_MS
            above = self._count - running_total
            while above * ticks << halvings <= self._count * (ticks - tick):
                inverse = (ticks << halvings) / (ticks - tick)
                level = 1 - 1 / inverse
                yield f"{value:12.6f} {level:2.12f} {running_total:10d} {inverse:14.2f}"
                tick += 1
                if tick == _TICKS_PER_HALF_DISTANCE:
                    halvings, tick = halvings + 1, 0
                if not above:  # this bucket reaches all levels that are left
                    yield f"{value:12.6f} {1:2.12f} {running_total:10d}"
                    return

    def summary(self) -> dict[str, Any]:
        """Return the figures in ns, and the histogram itself as `hdr`, for JSON."""
        return {
            "count": self._count,
            "mean": round(self.mean, 1),
            "stddev": round(self.stddev, 1),
            "min": self.min,
            **{f"p{percent}": self.percentile(percent) for percent in (50, 90, 99, 99.9, 99.99)},
            "max": self.max,
            "hdr": self.encode(),
        }

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Histogram:
        """Return the histogram of a summary(). Raise ValueError if it is missing or malformed."""
        encoded = summary.get("hdr")
        if not isinstance(encoded, str):
            raise ValueError("a summary without a histogram, 'hdr'")
        return cls.decode(encoded)

"""The buckets of a latency histogram: HdrHistogram's layout for three significant digits.

Source of the layout: the reference implementation, https://github.com/HdrHistogram/HdrHistogram
(AbstractHistogram.java). ext/loadgen/histogram.h has the same one.
"""

from __future__ import annotations

from array import array
from functools import cache

__all__ = [
    *("BUCKETS", "COUNTS_LENGTH", "HIGHEST", "HIGHEST_WITH_BUCKET", "LOWEST", "SIGNIFICANT_DIGITS"),
    *("SUB_BUCKETS", "check_index", "highest_equivalent", "index_of", "lowest_equivalent"),
    *("median_equivalent", "medians"),
]

LOWEST = 1  # the lowest value distinguished from 0, in ns
HIGHEST = 3_600_000_000_000  # the highest value distinguished from those above, in ns: an hour
SIGNIFICANT_DIGITS = 3

# Buckets have width 1 up to 2048, the next power of two after 2 * 10**3. From there on, each
# doubling of the value has 1024 buckets, twice as wide as those of the doubling before.
SUB_BUCKETS = 2048
_HALF_BITS = 10
BUCKETS = 32  # doublings, from 2048 to beyond HIGHEST
COUNTS_LENGTH = (BUCKETS + 1) * (SUB_BUCKETS // 2)
HIGHEST_WITH_BUCKET = (SUB_BUCKETS << (BUCKETS - 1)) - 1


def index_of(value: int) -> int:
    """Return the index of the bucket of a value in ns. Raise ValueError if there is none.

    Values from HIGHEST up to the next power of two have buckets as well.
    """
    if not 0 <= value <= HIGHEST_WITH_BUCKET:
        raise ValueError(f"a value in ns must be 0 to {HIGHEST_WITH_BUCKET} (got {value})")
    doubling = max(value.bit_length() - _HALF_BITS - 1, 0)
    return (doubling << _HALF_BITS) + (value >> doubling)


def check_index(index: int) -> None:
    """Raise ValueError unless there is a bucket with this index."""
    if not 0 <= index < COUNTS_LENGTH:
        raise ValueError(f"the index of a bucket must be 0 to {COUNTS_LENGTH - 1} (got {index})")


def _doubling_of(index: int) -> int:
    check_index(index)
    return max((index >> _HALF_BITS) - 1, 0)


def lowest_equivalent(index: int) -> int:
    """Return the lowest value of a bucket, in ns. Raise ValueError if there is no such bucket."""
    doubling = _doubling_of(index)
    return (index - (doubling << _HALF_BITS)) << doubling


def highest_equivalent(index: int) -> int:
    """Return the highest value of a bucket, in ns. Raise ValueError if there is no such bucket."""
    return lowest_equivalent(index) + (1 << _doubling_of(index)) - 1


def median_equivalent(index: int) -> int:
    """Return the value that stands for a bucket in mean and deviation, in ns.

    Raises ValueError if there is no such bucket.
    """
    return lowest_equivalent(index) + ((1 << _doubling_of(index)) >> 1)


@cache
def medians() -> array[int]:
    """Return median_equivalent() of every bucket, by index."""
    return array("Q", map(median_equivalent, range(COUNTS_LENGTH)))

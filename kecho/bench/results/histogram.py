"""Latency histograms that keep three significant digits, in HdrHistogram's buckets and formats.

Source of the bucket layout, the formats and the definitions of mean and deviation: the reference
implementation, https://github.com/HdrHistogram/HdrHistogram (AbstractHistogram.java,
PercentileIterator.java, HistogramLogWriter.java).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import Any

__all__ = [
    "COUNTS_LENGTH",
    "HIGHEST",
    "LOWEST",
    "SIGNIFICANT_DIGITS",
    "Histogram",
    "highest_equivalent",
    "index_of",
    "lowest_equivalent",
    "median_equivalent",
    "write_hlog",
]

LOWEST = 1  # the lowest value told apart from 0, in ns
HIGHEST = 3_600_000_000_000  # the highest value told apart from those above, in ns: an hour
SIGNIFICANT_DIGITS = 3

# Buckets of width 1 up to 2048, the next power of two after 2 * 10**3; from there on each doubling
# of the value has 1024 buckets, twice as wide as those of the doubling before.
_SUB_BUCKETS = 2048
_HALF_BITS = 10
_BUCKETS = 32  # doublings from 2048 until HIGHEST is below the end
COUNTS_LENGTH = (_BUCKETS + 1) * (_SUB_BUCKETS // 2)
_END = _SUB_BUCKETS << (_BUCKETS - 1)  # the first value that has no bucket

_MOST = 2**63 - 1  # samples: what a signed long holds in the other implementations
_NS_PER_MS = 1_000_000
_TICKS_PER_HALF_DISTANCE = 5

# The low byte of the word size, 0x10, marks counts of variable length: V2 always has it.
_COOKIE = 0x1C849303 | 0x10
_COMPRESSED_COOKIE = 0x1C849304 | 0x10
_WORD_SIZE_BITS = 0xF0  # readers of V2 ignore them
_OUTER = struct.Struct(">II")  # cookie, length of what follows
_HEADER = struct.Struct(">IIiiqqd")
_WORD_BYTES = 9  # of a 64-bit count at most: eight times 7 bits, then 8
_LONGEST_PAYLOAD = _HEADER.size + COUNTS_LENGTH * _WORD_BYTES


def index_of(value: int) -> int:
    """The index of the bucket of a value in ns; ValueError if there is none.

    Values from HIGHEST up to the next power of two have buckets as well.
    """
    if not 0 <= value < _END:
        raise ValueError(f"{value} is not between 0 and {_END - 1}")
    doubling = max(value.bit_length() - _HALF_BITS - 1, 0)
    return (doubling << _HALF_BITS) + (value >> doubling)


def _doubling_of(index: int) -> int:
    if not 0 <= index < COUNTS_LENGTH:
        raise ValueError(f"{index} is not the index of a bucket, 0 to {COUNTS_LENGTH - 1}")
    return max((index >> _HALF_BITS) - 1, 0)


def lowest_equivalent(index: int) -> int:
    """The lowest value, in ns, of the bucket; ValueError if there is none of this index."""
    doubling = _doubling_of(index)
    return (index - (doubling << _HALF_BITS)) << doubling


def highest_equivalent(index: int) -> int:
    """The highest value, in ns, of the bucket; ValueError if there is none of this index."""
    return lowest_equivalent(index) + (1 << _doubling_of(index)) - 1


def median_equivalent(index: int) -> int:
    """The value, in ns, that stands for the bucket in mean and deviation; ValueError likewise."""
    return lowest_equivalent(index) + ((1 << _doubling_of(index)) >> 1)


@cache
def _medians() -> array[int]:
    return array("Q", map(median_equivalent, range(COUNTS_LENGTH)))


class Histogram:
    """How many samples, in ns, fell into each bucket; immutable.

    ``one + other`` has the samples of both, ``later - earlier`` those that came between two
    snapshots. One without samples is false, and its figures are 0.
    """

    def __init__(self, counts: Mapping[int, int] = MappingProxyType({})) -> None:
        """From counts by the index of the bucket, in any order; zeros are dropped.

        ValueError if an index or a count is out of range, or all counts together are.
        """
        if counts:
            lowest, highest = min(counts), max(counts)
            if lowest < 0 or highest >= COUNTS_LENGTH:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"{wrong} is not the index of a bucket, 0 to {COUNTS_LENGTH - 1}")
            if min(counts.values()) < 0:
                raise ValueError(f"a count is negative: {min(counts.values())}")
        indices = array("H", sorted(index for index, count in counts.items() if count))
        self._hold(indices, [counts[index] for index in indices])

    def _hold(self, indices: array[int], values: list[int]) -> None:
        """Ascending, and without zeros. Ten bytes for a bucket, where a dict takes a hundred: a
        result may hold thousands of histograms."""
        self._count = sum(values)
        if self._count > _MOST:
            raise ValueError(f"more than {_MOST} samples")
        self._indices, self._values = indices, array("Q", values)

    @classmethod
    def of(cls, values: Iterable[int]) -> Histogram:
        """Of samples in ns; those above HIGHEST count as HIGHEST. ValueError if one is negative."""
        return cls(Counter(index_of(min(value, HIGHEST)) for value in values))

    def __add__(self, other: Histogram) -> Histogram:
        if not isinstance(other, Histogram):
            return NotImplemented
        counts = dict(self.counts)
        for index, count in other.counts.items():
            counts[index] = counts.get(index, 0) + count
        return Histogram(counts)

    def __sub__(self, earlier: Histogram) -> Histogram:
        """ValueError if `earlier` has samples that this one lacks."""
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
        """For each index, in their order, the samples up to and with its bucket."""
        return array("Q", accumulate(self._values))

    @property
    def counts(self) -> Mapping[int, int]:
        """The counts other than 0 by the index of the bucket, in ascending order."""
        return MappingProxyType(dict(zip(self._indices, self._values, strict=True)))

    @property
    def count(self) -> int:
        """How many samples there are."""
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
        """Of the samples and of their squares, each taken as the median of its bucket; exact."""
        medians = list(map(_medians().__getitem__, self._indices))
        totals = list(map(mul, self._values, medians))
        return sum(totals), sum(map(mul, totals, medians))

    @property
    def mean(self) -> float:
        """In ns, each sample taken as the median of its bucket; 0 without samples."""
        return self._sums[0] / self._count if self else 0.0

    @property
    def stddev(self) -> float:
        """Of the samples, not an estimate for more, in ns, as the mean; 0 without samples."""
        if not self:
            return 0.0
        total, squares = self._sums
        return math.sqrt((self._count * squares - total * total) / self._count**2)

    def percentile(self, percent: float) -> int:
        """The least highest value, in ns, of a bucket at or below which `percent` % of them lie.

        That is the bucket of the sample of rank ceil(percent / 100 * count), counted from 1; of
        the first for 0. `percent` is what it reads, 99.9 exactly 999/1000. 0 without samples;
        ValueError if `percent` is not between 0 and 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"{percent} is not a percentage")
        if not self:
            return 0
        rank = max(math.ceil(Fraction(repr(float(percent))) * self._count / 100), 1)
        return highest_equivalent(self._indices[bisect_left(self._running_totals, rank)])

    def count_above(self, value: int) -> int:
        """How many samples lie in buckets above that of `value`, in ns; ValueError if negative."""
        bucket = index_of(min(value, _END - 1))
        at = bisect_right(self._indices, bucket)
        return self._count - (self._running_totals[at - 1] if at else 0)

    # ---- V2 compressed encoding -------------------------------------------------------------

    def encode(self) -> str:
        """In HdrHistogram's compressed V2 encoding, in base64."""
        counts = bytearray()
        following = 0  # the index after the last one written
        for index, count in zip(self._indices, self._values, strict=True):
            zeros = index - following
            if zeros:
                # One zero is itself, several are their negative number.
                _put(counts, -zeros if zeros > 1 else 0)
            _put(counts, count)
            following = index + 1
        header = _HEADER.pack(_COOKIE, len(counts), 0, SIGNIFICANT_DIGITS, LOWEST, HIGHEST, 1.0)
        compressed = zlib.compress(header + counts)
        outer = _OUTER.pack(_COMPRESSED_COOKIE, len(compressed))
        return base64.b64encode(outer + compressed).decode("ascii")

    @classmethod
    def decode(cls, text: str) -> Histogram:
        """From what encode() or another implementation with the same range and digits wrote.

        ValueError, with a reason of one line, for anything else.
        """
        decoded = cls.__new__(cls)
        decoded._hold(*_counts_of(_payload_of(text)))
        return decoded

    @staticmethod
    def size_of(text: str) -> int:
        """How many bytes decode() would go through, of what encode() wrote: a few for each bucket
        with samples. The time and memory that it takes are in proportion. ValueError likewise."""
        return len(_payload_of(text))

    # ---- other forms ------------------------------------------------------------------------

    def to_hgrm(self) -> str:
        """The percentile distribution as text that HdrHistogram's plotter reads, in ms.

        Values have six decimals, whole nanoseconds, where the reference implementation has three.
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
            f"#[Buckets = {_BUCKETS:12d}, SubBuckets     = {_SUB_BUCKETS:12d}]",
        ]
        return "\n".join(lines) + "\n"

    def _percentile_rows(self) -> Iterator[str]:
        """One for each level that a bucket reaches, five levels to each halving of what remains.

        What remains above a level is (2 * 5 - tick) / (2 * 5) of the halving's 1 / 2**halvings;
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
                if not above:  # it reaches all levels that are left
                    yield f"{value:12.6f} {1:2.12f} {running_total:10d}"
                    return

    def summary(self) -> dict[str, Any]:
        """Figures in ns, and the histogram itself as `hdr`, for JSON."""
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
        """The histogram of a summary(); ValueError if it has none, or a malformed one."""
        encoded = summary.get("hdr")
        if not isinstance(encoded, str):
            raise ValueError("a summary without a histogram, 'hdr'")
        return cls.decode(encoded)


def _put(target: bytearray, number: int) -> None:
    """ZigZag LEB128 of 64 bits in nine bytes at most: the ninth has no continuation bit."""
    word = number << 1 if number >= 0 else (-number << 1) - 1
    for _ in range(_WORD_BYTES - 1):
        if word < 0x80:
            target.append(word)
            return
        target.append(word & 0x7F | 0x80)
        word >>= 7
    target.append(word)


def _payload_of(text: str) -> bytes:
    """The counts of an encoded histogram; ValueError if it is not one of our range and digits."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"a histogram is not base64: {error}") from None
    payload = _decompress(data)
    if len(payload) < _HEADER.size:
        raise ValueError("a histogram's header is truncated")
    cookie, length, offset, digits, lowest, highest, ratio = _HEADER.unpack_from(payload)
    if cookie & ~_WORD_SIZE_BITS != _COOKIE & ~_WORD_SIZE_BITS:
        raise ValueError(f"a histogram has cookie {cookie:#x}, that of V2 is {_COOKIE:#x}")
    if (lowest, highest, digits) != (LOWEST, HIGHEST, SIGNIFICANT_DIGITS):
        raise ValueError(
            f"a histogram of {lowest} to {highest} with {digits} digits; only those of "
            f"{LOWEST} to {HIGHEST} with {SIGNIFICANT_DIGITS} are supported"
        )
    if offset != 0 or ratio != 1.0:
        raise ValueError("a histogram is shifted or scaled, which is not supported")
    if length != len(payload) - _HEADER.size:
        raise ValueError(
            f"a histogram has {len(payload) - _HEADER.size} bytes of counts, not the {length} "
            "that it says"
        )
    return payload[_HEADER.size :]


def _counts_of(data: bytes) -> tuple[array[int], list[int]]:
    """Indices and counts, from what _put() wrote; ValueError if malformed."""
    indices, counts = array("H"), []
    index = word = shift = 0
    for byte in data:
        if shift == 7 * (_WORD_BYTES - 1):
            word |= byte << shift
        elif byte & 0x80:
            word |= (byte & 0x7F) << shift
            shift += 7
            continue
        else:
            word |= byte << shift
        # ZigZag: odd ones are negative, so many zeros; 0 is one zero.
        if word & 1:
            index += (word >> 1) + 1
        else:
            if word and index < COUNTS_LENGTH:
                indices.append(index)
                counts.append(word >> 1)
            index += 1
        if index > COUNTS_LENGTH:
            raise ValueError(f"a histogram has more than {COUNTS_LENGTH} counts")
        word = shift = 0
    if shift:
        raise ValueError("a histogram's last count is truncated")
    return indices, counts


def _decompress(data: bytes) -> bytes:
    """The payload, of which not more is unpacked than can be valid; ValueError if malformed."""
    if len(data) < _OUTER.size:
        raise ValueError("a histogram's outer header is truncated")
    cookie, length = _OUTER.unpack_from(data)
    if cookie & ~_WORD_SIZE_BITS != _COMPRESSED_COOKIE & ~_WORD_SIZE_BITS:
        raise ValueError(
            f"a histogram has cookie {cookie:#x}, that of compressed V2 is {_COMPRESSED_COOKIE:#x}"
        )
    if length != len(data) - _OUTER.size:
        raise ValueError(
            f"a histogram has {len(data) - _OUTER.size} compressed bytes, not the {length} "
            "that it says"
        )
    stream = zlib.decompressobj()
    try:
        payload = stream.decompress(data[_OUTER.size :], _LONGEST_PAYLOAD + 1)
    except zlib.error as error:
        raise ValueError(f"a histogram cannot be decompressed: {error}") from None
    if len(payload) > _LONGEST_PAYLOAD:
        raise ValueError(f"a histogram is longer than {_LONGEST_PAYLOAD} bytes")
    if not stream.eof:
        raise ValueError("a histogram's compressed data is truncated")
    if stream.unused_data:
        raise ValueError("a histogram's compressed data is followed by more")
    return payload


def write_hlog(intervals: Iterable[tuple[str, float, float, Histogram]], started_at: float) -> str:
    """A log in HdrHistogram's format 1.3.

    intervals: for each the tag (empty: none), when it started (seconds after `started_at`), how
        long it was (seconds), and its samples.
    started_at: seconds since the epoch.

    ValueError if a tag has a comma or white space, or a time is negative or not finite: the
    format cannot say them.
    """
    _check_time(started_at)
    moment = datetime.fromtimestamp(started_at, UTC).isoformat(timespec="milliseconds")
    lines = [
        "#[Histogram log format version 1.3]",
        f"#[StartTime: {started_at:.3f} (seconds since epoch), {moment}]",
        # Without it readers guess whether the timestamps below are relative.
        f"#[BaseTime: {started_at:.3f} (seconds since epoch)]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
    ]
    for tag, start, duration, histogram in intervals:
        if any(character == "," or character.isspace() for character in tag):
            raise ValueError(f"a tag has a comma or white space: {tag!r}")
        _check_time(start)
        _check_time(duration)
        tagged = f"Tag={tag}," if tag else ""
        highest = histogram.max / _NS_PER_MS
        lines.append(f"{tagged}{start:.6f},{duration:.6f},{highest:.6f},{histogram.encode()}")
    return "\n".join(lines) + "\n"


def _check_time(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} is not a time in seconds")

"""How a histogram is written and read: HdrHistogram V2, percentile distributions, logs."""

from __future__ import annotations

import base64
import math
import re
import struct
import tracemalloc
import zlib

import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
from hypothesis import given, settings
from hypothesis import strategies as st

from kecho.bench.results.buckets import (
    COUNTS_LENGTH,
    HIGHEST,
    LOWEST,
    highest_equivalent,
    index_of,
)
from kecho.bench.results.histogram import Histogram
from kecho.bench.results.hlog import write_hlog
from support.histograms import HISTOGRAM, LONG_MAX, VALUES, exact_rank, theirs

pytestmark = pytest.mark.python_only


def counts_of(histogram: HdrHistogram) -> dict[int, int]:
    counts = enumerate(histogram.counts[: histogram.counts_len])
    return {index: count for index, count in counts if count}


def encoded(payload: bytes, *, after: bytes = b"", cookie: int = 0x1C849314) -> str:
    """The base64 of a payload that is compressed as it should be."""
    compressed = zlib.compress(payload) + after
    return base64.b64encode(struct.pack(">II", cookie, len(compressed)) + compressed).decode()


def payload(
    counts: bytes = b"",
    cookie: int = 0x1C849313,
    length: int | None = None,
    offset: int = 0,
    digits: int = 3,
    lowest: int = LOWEST,
    highest: int = HIGHEST,
    ratio: float = 1.0,
) -> bytes:
    length = len(counts) if length is None else length
    return struct.pack(">IIiiqqd", cookie, length, offset, digits, lowest, highest, ratio) + counts


def payload_of(text: str | bytes) -> bytes:
    return zlib.decompress(base64.b64decode(text)[8:])


# ---- the encoding, with the package at the other end ------------------------------------------


@given(HISTOGRAM)
def test_decoding_undoes_encoding(histogram: Histogram) -> None:
    assert Histogram.decode(histogram.encode()) == histogram


WIDTHS = [1, 63, 64, 127, 128, *(2**bits for bits in range(8, 63)), LONG_MAX]


@pytest.mark.parametrize("index", [0, 1, 2, COUNTS_LENGTH - 1])
def test_every_width_of_a_count(index: int) -> None:
    for count in WIDTHS:
        text = Histogram({index: count}).encode()
        assert Histogram.decode(text) == Histogram({index: count})
        # The package drops the eighth bit of the ninth byte, which the format has for the count.
        if count < 2**62:
            assert counts_of(HdrHistogram.decode(text)) == {index: count}


# The package goes through all buckets for each figure.
@settings(max_examples=20, deadline=None)
@given(VALUES)
def test_the_package_reads_what_was_encoded(values: list[int]) -> None:
    histogram = Histogram.of(values)
    read = HdrHistogram.decode(histogram.encode())
    assert counts_of(read) == histogram.counts
    assert read.get_total_count() == histogram.count
    assert read.get_min_value() == histogram.min
    assert read.get_max_value() == histogram.max
    assert read.get_mean_value() == pytest.approx(histogram.mean)
    assert read.get_stddev() == pytest.approx(histogram.stddev, rel=1e-6, abs=1e-3)
    # The package rounds the rank to the nearest, where ours is the next that covers the share:
    # only where both are the same must the values be.
    for percent in (1, 25, 50, 90, 99, 99.9, 100):
        if values and read.get_target_count_at_percentile(percent) == exact_rank(
            percent, len(values)
        ):
            assert read.get_value_at_percentile(percent) == histogram.percentile(percent)


@settings(deadline=None)
@given(VALUES)
def test_what_the_package_encodes_is_read(values: list[int]) -> None:
    encoded_by_them = theirs(values).encode()
    histogram = Histogram.decode(encoded_by_them.decode())
    assert histogram == Histogram.of(values)
    # All but the length and the counts: of a single zero the package makes a run of one, where the
    # reference implementation writes it as it is.
    ours, package = payload_of(histogram.encode()), payload_of(encoded_by_them)
    assert (ours[:4], ours[8:40]) == (package[:4], package[8:40])


def test_encoded_form() -> None:
    """0 once, 2047 zeros but one, then 3 and, one zero later, 300 samples."""
    text = Histogram({0: 1, 2047: 3, 2049: 300}).encode()
    assert base64.b64decode(text)[:4] == bytes.fromhex("1c849314")
    assert payload_of(text) == payload(b"\x02" + b"\xfb\x1f" + b"\x06" + b"\x00" + b"\xd8\x04")


def test_empty_counts_are_read_however_they_are_written() -> None:
    """The Java implementation writes one zero."""
    for counts in (b"", b"\0", b"\0\0", b"\1", b"\0" * COUNTS_LENGTH):
        assert Histogram.decode(encoded(payload(counts))) == Histogram()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "outer header is truncated"),
        ("HISTFAAAAE", "is not base64: "),
        ("HIST FAAA", "is not base64: "),
        ("\u0661", "is not base64: "),
        ("\ud800", "is not base64: "),
        (base64.b64encode(bytes.fromhex("1c849314000000")).decode(), "outer header is truncated"),
        (encoded(payload(), cookie=0x1C849302), "has cookie 0x1c849302, that of compressed V2"),
        (encoded(payload())[:-4], "compressed bytes, not the"),
        (encoded(payload(), after=b"\0"), "compressed data is followed by more"),
        (
            base64.b64encode(bytes.fromhex("1c84931400000004") + b"\0\0\0\0").decode(),
            "cannot be decompressed: ",
        ),
        (
            base64.b64encode(
                bytes.fromhex("1c84931400000010") + zlib.compress(payload())[:16]
            ).decode(),
            "compressed data is truncated",
        ),
        (encoded(payload()[:39]), "header is truncated"),
        (encoded(payload(cookie=0x1C849301)), "has cookie 0x1c849301, that of V2 is 0x1c849313"),
        (encoded(payload(length=1)), "has 0 bytes of counts, not the 1 that it says"),
        (encoded(payload(b"\2", length=0)), "has 1 bytes of counts, not the 0 that it says"),
        (encoded(payload(digits=2)), "of 1 to 3600000000000 with 2 digits; only those of 1 to "),
        (encoded(payload(lowest=1000)), "of 1000 to 3600000000000 with 3 digits; only"),
        (encoded(payload(highest=10**6)), "of 1 to 1000000 with 3 digits; only"),
        (encoded(payload(offset=1)), "is shifted or scaled"),
        (encoded(payload(ratio=0.5)), "is shifted or scaled"),
        (encoded(payload(ratio=math.nan)), "is shifted or scaled"),
        (encoded(payload(b"\x02\x80")), "last count is truncated"),
        (encoded(payload(b"\xff" * 8)), "last count is truncated"),
        (encoded(payload(b"\x02" * (COUNTS_LENGTH + 1))), "has more than 33792 counts"),
        (encoded(payload(b"\xff" * 9)), "has more than 33792 counts"),  # a run of 2**63 zeros
        (encoded(payload((b"\xfe" + b"\xff" * 8) * 2)), f"more than {LONG_MAX} samples"),
    ],
)
def test_malformed(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        Histogram.decode(text)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def decode_or_refuse(text: str) -> None:
    try:
        histogram = Histogram.decode(text)
    except ValueError as error:
        reason = str(error)
    else:
        assert Histogram.decode(histogram.encode()) == histogram
        return
    assert re.fullmatch(r".*histogram.*|more than \d+ samples", reason)


@given(st.text())
def test_any_text_is_decoded_or_refused(text: str) -> None:
    decode_or_refuse(text)


@given(st.binary(), st.booleans())
def test_any_bytes_are_decoded_or_refused(data: bytes, has_header: bool) -> None:
    header = struct.pack(">II", 0x1C849314, len(data)) if has_header else b""
    decode_or_refuse(base64.b64encode(header + data).decode())


@given(st.binary(max_size=400))
def test_any_counts_are_decoded_or_refused(counts: bytes) -> None:
    decode_or_refuse(encoded(payload(counts)))


MUTATION = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 3))


def mutated(data: bytes, mutations: list[tuple[float, bytes, int]]) -> bytes:
    for where, replacement, length in mutations:
        at = int(where * len(data))
        data = data[:at] + replacement + data[at + length :]
    return data


@given(HISTOGRAM, st.lists(MUTATION, min_size=1, max_size=4))
def test_mutated_encodings_are_decoded_or_refused(
    histogram: Histogram, mutations: list[tuple[float, bytes, int]]
) -> None:
    text = histogram.encode()
    decode_or_refuse(mutated(text.encode(), mutations).decode("latin-1"))
    decode_or_refuse(base64.b64encode(mutated(base64.b64decode(text), mutations)).decode())
    decode_or_refuse(encoded(mutated(payload_of(text), mutations)))


def test_what_unpacks_to_very_much_is_refused_before_it_does() -> None:
    bomb = encoded(payload(bytes(100_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^a histogram is longer than 304168 bytes$"):
            Histogram.decode(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


def test_the_longest_payload_is_read() -> None:
    """Every count takes nine bytes, though it needs but one."""
    counts = (b"\x82" + b"\x80" * 7 + b"\0") * COUNTS_LENGTH
    assert Histogram.decode(encoded(payload(counts))).count == COUNTS_LENGTH


# ---- percentile distribution ------------------------------------------------------------------


def test_percentile_distribution_of_a_few_samples() -> None:
    histogram = Histogram.of([1_000_000, 2_000_000, 2_000_000, 5_000_000])
    assert histogram.to_hgrm() == (
        "       Value     Percentile TotalCount 1/(1-Percentile)\n"
        "\n"
        "    1.000447 0.000000000000          1           1.00\n"
        "    1.000447 0.100000000000          1           1.11\n"
        "    1.000447 0.200000000000          1           1.25\n"
        "    2.000895 0.300000000000          3           1.43\n"
        "    2.000895 0.400000000000          3           1.67\n"
        "    2.000895 0.500000000000          3           2.00\n"
        "    2.000895 0.550000000000          3           2.22\n"
        "    2.000895 0.600000000000          3           2.50\n"
        "    2.000895 0.650000000000          3           2.86\n"
        "    2.000895 0.700000000000          3           3.33\n"
        "    2.000895 0.750000000000          3           4.00\n"
        "    5.001215 0.775000000000          4           4.44\n"
        "    5.001215 1.000000000000          4\n"
        "#[Mean    =     2.500032, StdDeviation   =     1.499541]\n"
        "#[Max     =     5.001215, Total count    =            4]\n"
        "#[Buckets =           32, SubBuckets     =         2048]\n"
    )


# The package's own distribution is no measure: it lets the step shrink with every level, where
# the reference implementation halves it once the remaining distance has halved.
@given(HISTOGRAM)
def test_a_percentile_distribution_rises_to_all_samples(histogram: Histogram) -> None:
    lines = histogram.to_hgrm().splitlines()
    rows = [line.split() for line in lines[2:] if not line.startswith("#")]
    if not histogram:
        assert rows == []
        return
    assert all(len(row) == 4 for row in rows[:-1])
    values, levels = ([float(row[column]) for row in rows] for column in (0, 1))
    totals = [int(row[2]) for row in rows]
    inverses = [float(row[3]) for row in rows[:-1]]
    for column in (values, levels, totals, inverses):
        assert column == sorted(column)
    assert (levels[0], inverses[0]) == (0.0, 1.0)
    assert (levels[-1], totals[-1]) == (1.0, histogram.count)
    assert values[-1] == pytest.approx(histogram.max / 1e6)
    for level, total in zip(levels, totals, strict=True):
        assert total / histogram.count >= level - 1e-11
    assert all(
        round(value * 1e6) == highest_equivalent(index_of(round(value * 1e6))) for value in values
    )
    assert len(rows) <= 5 * (histogram.count.bit_length() + 1) + 2


# ---- log --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "echo", "warm-up", "a=b"]),
            st.floats(0, 1e6),
            st.floats(0, 100),
            HISTOGRAM,
        ),
        max_size=5,
    ),
    st.floats(0, 2e9),
)
def test_a_log_is_read_by_the_package(
    tmp_path_factory: pytest.TempPathFactory,
    intervals: list[tuple[str, float, float, Histogram]],
    started_at: float,
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.hlog"
    path.write_text(write_hlog(intervals, started_at))
    reader = HistogramLogReader(str(path), theirs())
    try:
        for tag, start, duration, histogram in intervals:
            read = reader.get_next_interval_histogram()
            assert (read.get_tag() or "") == tag
            assert counts_of(read) == histogram.counts
            begin, end = read.get_start_time_stamp(), read.get_end_time_stamp()
            assert begin == pytest.approx((started_at + start) * 1000, abs=1)
            assert end == pytest.approx((started_at + start + duration) * 1000, abs=1)
        assert reader.get_next_interval_histogram() is None
        assert reader.get_start_time_sec() == pytest.approx(started_at, abs=0.001)
    finally:
        reader.close()


def test_a_log_in_full() -> None:
    histogram = Histogram.of([1_500_000])
    intervals = [("echo", 0.25, 1.0, histogram), ("", 1.25, 0.5, Histogram())]
    assert write_hlog(intervals, 1_700_000_000.5).splitlines() == [
        "#[Histogram log format version 1.3]",
        "#[StartTime: 1700000000.500 (seconds since epoch), 2023-11-14T22:13:20.500+00:00]",
        "#[BaseTime: 1700000000.500 (seconds since epoch)]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
        f"Tag=echo,0.250000,1.000000,1.500159,{histogram.encode()}",
        f"1.250000,0.500000,0.000000,{Histogram().encode()}",
    ]


@pytest.mark.parametrize("tag", ["a,b", " ", "a b", "a\n", "\u2028"])
def test_a_tag_that_a_log_cannot_say(tag: str) -> None:
    with pytest.raises(ValueError, match=r"^a tag has a comma or white space: "):
        write_hlog([(tag, 0.0, 1.0, Histogram())], 0.0)


@pytest.mark.parametrize("time", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_time_that_a_log_cannot_say(where: int, time: float) -> None:
    times = [0.0, 0.0, 0.0]
    times[where] = time
    with pytest.raises(ValueError, match=r"is not a time in seconds$"):
        write_hlog([("", times[0], times[1], Histogram())], times[2])

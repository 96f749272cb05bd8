"""Results as tables, CSV and text."""

from __future__ import annotations

import csv
import io

import pytest

from kecho.bench import Workload, amounts
from kecho.bench.output import report
from kecho.bench.results.rounds import Round
from support.faultless_run import result

pytestmark = pytest.mark.python_only


def test_the_table_marks_percentiles_without_enough_samples() -> None:
    lines = report.text(result()).splitlines()
    row = next(line for line in lines if line.startswith("service"))
    assert row.count("~") == 2  # 2,000 samples: p99.9 and p99.99
    assert "verdict     valid" in lines


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1.00 µs"),
        (99_960, "100 µs"),
        (1_234_567, "1.23 ms"),
        (45_678_901, "45.7 ms"),
        (3.6e12, "3600 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(ns: float, shown: str) -> None:
    assert amounts.duration_text(ns) == shown


def test_csv_has_a_line_for_each_latency() -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv([result(), result(latency={})]))))
    assert len(rows) == 2
    assert rows[0]["latency"] == "service"
    assert int(rows[0]["p50_ns"]) == result().latency["service"].percentile(50)
    assert rows[1]["latency"] == rows[1]["p50_ns"] == ""


def test_every_line_of_csv_has_as_many_fields() -> None:
    lines = csv.reader(io.StringIO(report.to_csv([result(), result(latency={})])))
    assert {len(line) for line in lines} == {22}


def test_the_table_and_csv_have_the_percentiles_that_were_asked_for() -> None:
    one = result()
    table = report.text(one, (95.0, 99.95))
    assert table.splitlines()[3].split() == ["mean", "p95", "p99.95", "max", "samples"]
    (row,) = csv.DictReader(io.StringIO(report.to_csv([one], (95.0, 99.95))))
    assert int(row["p99.95_ns"]) == one.latency["service"].percentile(99.95)
    assert "p50_ns" not in row


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0.0, "0"), (0.05, "0.05"), (0.5, "0.5"), (2.5, "2.5"), (9.994, "9.99"), (99.96, "100")]
    + [(12.0, "12"), (1234.5, "1,234"), (20_000.0, "20,000")],
)
def test_low_rates_are_no_whole_numbers(rate: float, shown: str) -> None:
    assert amounts.rate_text(rate) == shown


def test_a_table_says_one_of_one() -> None:
    workload = Workload(
        mode="open", rate=0.5, connections=1, threads=1, udp=True, length=64
    ).to_dict()
    said = report.text(
        result([1000], workload=workload, duration_s=2.0, observed={"lost": 1, "late": 1})
    )
    assert "1 connection, 64 B, 10 s, 0.5 messages/s, 1 thread\n" in said
    assert "1 in 2.000 s: 0.5/s, 32 B/s each way" in said
    assert "1 datagram (50.000%); 1 reply late" in said


def test_the_text_file_has_the_mean_over_the_rounds_by_connection() -> None:
    one = result(rounds=(Round((1, 1), (1, 1), (1000, 0)), Round((1, 1), (1, 1), (3000, 0))))
    assert report.to_txt(one) == "0 2.000\n"
    with pytest.raises(ValueError, match="no times by connection"):
        report.to_txt(result())

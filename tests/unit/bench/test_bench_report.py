"""Results as tables, CSV and text."""

from __future__ import annotations

import csv
import io

import pytest

from kecho.bench import report
from kecho.bench.result import Round
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
    assert report.duration_text(ns) == shown


def test_csv_has_a_line_for_each_latency() -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv([result(), result(latency={})]))))
    assert len(rows) == 2
    assert rows[0]["latency"] == "service"
    assert int(rows[0]["p50_ns"]) == result().latency["service"].percentile(50)
    assert rows[1]["latency"] is None or rows[1]["latency"] == ""


def test_the_text_file_has_the_mean_over_the_rounds_by_connection() -> None:
    one = result(rounds=(Round((1, 1), (1, 1), (1000, 0)), Round((1, 1), (1, 1), (3000, 0))))
    assert report.to_txt(one) == "0 2.000\n"
    with pytest.raises(ValueError, match="no times by connection"):
        report.to_txt(result())

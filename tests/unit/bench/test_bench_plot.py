"""Pictures of results: what is drawn, read back from the figure."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from kecho.bench import Histogram, Result, Verdict, Workload, page, plot
from kecho.bench.result import Interval

pytestmark = pytest.mark.python_only

pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")


@pytest.fixture
def axis() -> Iterator[Any]:
    figure, one = pyplot.subplots()
    yield one
    pyplot.close(figure)


def result(mode: str = "closed", **changes: Any) -> Result:
    more = {"rate": 5000.0} if mode == "open" else {}
    name = {"open": "response", "stream": "connect"}.get(mode, "service")
    series = tuple(
        Interval.of(float(second), 1.0, 5000, 10**9, Histogram.of([2_000_000]))
        for second in range(3)
    )
    values: dict[str, Any] = {
        "workload": Workload(mode=mode, connections=5, **more).to_dict(),
        "environment": {"kernel": "6.1", "usable_cpus": 2, "kecho": "0"},
        "started_at": 0.0,
        "duration_s": 3.0,
        "connections": 5,
        "echoes": 15_000,
        "bytes_sent": 3 * 10**9,
        "bytes_received": 3 * 10**9,
        "latency": {name: Histogram.of([1_000_000, 2_000_000])},
        "series": series,
    }
    return Result(**{**values, **changes})


@pytest.fixture(autouse=True, scope="module")
def fonts_are_open() -> None:
    """matplotlib never closes a font that it has drawn with."""
    plot.plot([result()], io.BytesIO(), "png")


def names(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_rate_over_time_has_room_above_and_p99_is_named(axis: Any) -> None:
    plot._over_time(axis, [result("open")])
    assert axis.get_ylim() == (0, pytest.approx(5.5))
    assert names(axis) == ["echoes/s", "p99"]


def test_a_stream_shows_bytes_over_time_and_no_time_to_connect(axis: Any) -> None:
    one = result("stream")
    assert plot._panels([one]) == [plot._over_time]
    plot._over_time(axis, [one])
    assert axis.get_ylabel() == "MB/s each way"
    assert list(axis.lines[0].get_ydata()) == [1000.0] * 3


def test_repeats_are_drawn_over_time_each_under_one_name(axis: Any) -> None:
    repeats = Result.merge([result(), result(), result()])
    assert plot._over_time in plot._panels([repeats])
    plot._over_time(axis, [repeats, result("open")])
    assert len(axis.lines) == 4
    assert len(names(axis)) == 2


def test_a_result_without_a_line_has_no_name(axis: Any) -> None:
    plot._over_time(axis, [result(), result(series=())])
    assert len(names(axis)) == len(axis.lines) == 1


@pytest.mark.parametrize("values", [(0.3, 0.9), (150.0, 700.0), (0.01, 200.0)])
def test_ticks_are_plain_numbers(axis: Any, values: tuple[float, float]) -> None:
    axis.plot([1, 2], values)
    plot.set_log(axis, "y")
    axis.figure.canvas.draw()
    shown = [
        tick.get_text()
        for minor in (False, True)
        for tick in axis.get_yticklabels(minor=minor)
        if tick.get_text()
    ]
    assert shown
    for text in shown:
        float(text)  # not $\\mathdefault{6\\times10^{-1}}$


def test_the_footer_says_whose_reason_it_is_and_how_many_more_there_are() -> None:
    bad = result("open", verdict=Verdict(("late", "noise")))
    assert plot._footer([bad]).startswith("NOT VALID: late (and 1 more)")
    said = plot._footer([result(), bad])
    assert said.startswith("NOT VALID: 5,000/s: late (and 1 more)")


@pytest.mark.parametrize("text", ["$\\foo{$", "a $x$ b"])
def test_text_of_others_is_no_formula(text: str) -> None:
    workload = Workload(mode="closed", connections=5, uds=f"/tmp/{text}").to_dict()
    one = result(workload=workload, verdict=Verdict((text,)))
    plot.plot([one], io.BytesIO(), "png")
    assert "<svg" in page.to_html([one])

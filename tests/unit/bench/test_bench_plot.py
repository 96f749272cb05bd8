"""Pictures of results: what is drawn, read back from the figure."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kecho.bench import Histogram, Result, Verdict, Workload, subcommands
from kecho.bench.output import axes, page, panels, plot
from kecho.bench.results.series import Interval

pytestmark = pytest.mark.python_only

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
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
    panels.over_time(axis, [result("open")])
    assert axis.get_ylim() == (0, pytest.approx(5.5))
    assert names(axis) == ["echoes/s", "p99"]


def test_a_stream_shows_bytes_over_time_and_no_time_to_connect(axis: Any) -> None:
    one = result("stream")
    assert plot._panels([one]) == [panels.over_time]
    panels.over_time(axis, [one])
    assert axis.get_ylabel() == "MB/s each way"
    assert list(axis.lines[0].get_ydata()) == [1000.0] * 3


def test_repeats_are_drawn_over_time_each_under_one_name(axis: Any) -> None:
    repeats = Result.merge([result(), result(), result()])
    assert panels.over_time in plot._panels([repeats])
    panels.over_time(axis, [repeats, result("open")])
    assert len(axis.lines) == 4
    assert len(names(axis)) == 2


def test_a_result_without_a_line_has_no_name(axis: Any) -> None:
    panels.over_time(axis, [result(), result(series=())])
    assert len(names(axis)) == len(axis.lines) == 1


def step(name: str, rate: float, reached: float) -> Result:
    one = result("open", name=name, duration_s=1.0, echoes=round(reached))
    return replace(one, workload={**one.workload, "rate": rate})


def test_files_are_told_apart_by_their_names(axis: Any) -> None:
    panels.percentiles(axis, [result(name="before"), result(name="after")])
    assert names(axis) == ["before", "after"]


def test_steps_of_files_are_told_by_both(axis: Any) -> None:
    steps = [step("a", 0.2, 1), step("a", 0.4, 1), step("b", 0.2, 1)]
    panels.percentiles(axis, steps)
    assert names(axis) == ["a, 0.2/s", "a, 0.4/s", "b"]


def test_each_file_has_a_line_against_throughput(axis: Any) -> None:
    panels.against_throughput(axis, [step("a", 10, 10), step("b", 10, 10), step("a", 20, 20)])
    assert [len(line.get_xdata()) for line in axis.lines] == [2, 2, 2, 1, 1, 1]


def test_beyond_saturation_the_line_turns_back(axis: Any) -> None:
    reached = {4000.0: 3500.0, 1000.0: 1000.0, 3000.0: 3000.0, 8000.0: 2000.0, 2000.0: 2000.0}
    panels.against_throughput(axis, [step("", *pair) for pair in reached.items()])
    assert list(axis.lines[0].get_xdata()) == [1.0, 2.0, 3.0, 3.5, 2.0]


def test_twenty_steps_have_twenty_colours(axis: Any) -> None:
    panels.percentiles(axis, [step("", 1000.0 * n, 1000.0 * n) for n in range(1, 21)])
    colours = {matplotlib.colors.to_hex(line.get_color()) for line in axis.lines}
    assert len(colours) == len(axis.lines) == 20


@pytest.mark.parametrize(
    "draw", [lambda pair: plot.plot(pair, io.BytesIO(), "png"), lambda pair: page.to_html(pair)]
)
def test_unlike_runs_are_not_drawn_together(draw: Any) -> None:
    burst = result("burst", name="burst", latency={"response": Histogram.of([1])})
    with pytest.raises(ValueError, match="burst is of mode burst, other is of mode closed"):
        draw([burst, result(name="other")])


def test_the_title_is_of_all_results() -> None:
    workloads = [Workload(mode="closed", connections=n, length=n, port=n) for n in (1, 20)]
    results = [result(workload=one.to_dict()) for one in workloads]
    assert plot._title(results) == "closed at 2 servers: 1 / 20 connections of 1 / 20 B"
    many = [result(workload=replace(workloads[0], connections=n).to_dict()) for n in range(1, 21)]
    assert plot._title(many) == "closed at 127.0.0.1:1: 1 to 20 connections of 1 B"


def test_machine_differences_are_named() -> None:
    other = result(environment={"kernel": "6.18", "usable_cpus": 2})
    assert "different machines: kernel: 6.1, 6.18" in plot._footer([result(), other])
    assert "Measured on different machines: kernel: 6.1, 6.18" in page.to_html([result(), other])


@pytest.mark.parametrize("values", [(0.3, 0.9), (150.0, 700.0), (0.01, 200.0)])
def test_ticks_are_plain_numbers(axis: Any, values: tuple[float, float]) -> None:
    axis.plot([1, 2], values)
    axes.set_log(axis, "y")
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


def test_a_file_of_the_current_directory_says_nothing_about_a_picture(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("figure.hooks: os:abort\ntext.usetex: True\n")
    (tmp_path / "bench.json").write_text(result().to_json())
    command = [sys.executable, "-P", "-m", "kecho.bench", "plot", "bench.json", "-o", "bench.png"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_a_result_is_named_after_its_file_or_the_whole_path_of_it(tmp_path: Path) -> None:
    paths = [tmp_path / "one" / "run.json", tmp_path / "two" / "run.json"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(result().to_json())
    assert [one.name for one in subcommands._load_all([str(paths[0])])] == ["run"]
    named = [one.name for one in subcommands._load_all([*map(str, paths)])]
    assert named == [*map(str, paths)]

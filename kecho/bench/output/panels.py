"""The panels of a picture: each function draws one view of some results on an axis."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

from ...command import plural
from ...printable import one_line
from ..amounts import rate_text
from ..results.histogram import Histogram
from ..results.result import Result
from ..results.rounds import Round
from ..results.series import Interval
from .axes import COLOURS, MOST_DOTS, colour, set_log, set_time_scale

__all__ = [
    *("against_connections", "against_throughput", "all_series", "by_connection", "by_round"),
    *("label", "over_time", "percentiles"),
]

T = TypeVar("T")

_COLOUR_OF = {
    "response": COLOURS[0],
    "service": COLOURS[2],
    "connect": COLOURS[3],
    "first_echo": COLOURS[1],
}
_MOST_NINES = 6
_MOST_NAMED = 4  # lines that fit in the legend beside a title
_MOST_LINES, _MOST_BOXES = 100, 100  # on one picture; more could not be told apart


def label(result: Result, results: Sequence[Result]) -> str:
    """Return what tells a result from the others: its file, its step, or both."""
    others = [one for one in results if one.name == result.name]
    parts = [result.name] if len(others) < len(results) else []
    if len(others) > 1 or not parts:
        parts.append(_step(result, others))
    return one_line(", ".join(parts))


def _step(result: Result, others: Sequence[Result]) -> str:
    if len({one.workload["connections"] for one in others}) == len(others):
        return plural(result.workload["connections"], "connection")
    if result.workload["rate"]:
        return f"{rate_text(result.workload['rate'])}/s"
    return f"{rate_text(result.rate_per_s)} echoes/s"


def _by_file(results: Sequence[Result]) -> dict[str, list[Result]]:
    files: dict[str, list[Result]] = {}
    for result in results:
        files.setdefault(result.name, []).append(result)
    return files


def all_series(results: Sequence[Result]) -> list[tuple[Result, tuple[Interval, ...]]]:
    """Return every series over time with its result. Each repeat has a series of its own."""
    return [
        (result, one.series)
        for result in results
        for one in (result.repeats or (result,))
        if one.series
    ]


def _some(every: Sequence[T]) -> Sequence[T]:
    """Return as many as can be told apart, from the first on at even distances."""
    return every[:: -(-len(every) // _MOST_LINES) or 1]


def _of_how_many(drawn: Sequence[object], every: Sequence[object]) -> str:
    return f", {len(drawn)} of {len(every)}" if len(drawn) < len(every) else ""


def by_connection(axis: Any, results: Sequence[Result]) -> None:
    """Draw times by connection number: a slow connection stands out, whenever it finished."""
    rounds = results[0].rounds
    for name, title, shade in (
        ("response_ns", "response, from the instant", _COLOUR_OF["response"]),
        ("connect_ns", "connect", _COLOUR_OF["connect"]),
        ("first_echo_ns", "first echo, from send", _COLOUR_OF["first_echo"]),
    ):
        numbers, times = _dots(rounds, name)
        axis.plot(
            numbers,
            times,
            ".",
            markersize=2.2,
            alpha=0.35,
            color=shade,
            label=title,
            rasterized=True,
        )
    step = _step_of(rounds)
    thinned = f", the slowest of each {step}" if step > 1 else ""
    axis.set_title(f"by connection, every round{thinned}", loc="left")
    axis.set_xlabel("connection number")
    axis.set_ylabel("ms")
    set_time_scale(axis, _dots(rounds, "response_ns")[1])
    legend = axis.legend(loc="best", markerscale=5, framealpha=0.9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _step_of(rounds: Sequence[Round]) -> int:
    return -(-sum(len(one.response_ns) for one in rounds) // MOST_DOTS)


def _dots(rounds: Sequence[Round], name: str) -> tuple[array[int], array[float]]:
    """Return connection numbers and times in ms.

    If there are too many, only the slowest of neighbours is kept: a slow one is never left out.
    """
    step = _step_of(rounds)
    numbers, times = array("L"), array("d")
    every = (pair for one in rounds for pair in enumerate(getattr(one, name)) if pair[1])
    while some := list(islice(every, step)):
        number, ns = max(some, key=itemgetter(1))
        numbers.append(number)
        times.append(ns / 1e6)
    return numbers, times


def by_round(axis: Any, results: Sequence[Result]) -> None:
    """Draw the spread of response times in each round, or in groups of rounds."""
    rounds = results[0].rounds
    together = -(-len(rounds) // _MOST_BOXES)
    shown = []
    for begin in range(0, len(rounds), together):
        some = rounds[begin : begin + together]
        times = array("d", (ns / 1e6 for one in some for ns in one.response_ns if ns))
        if times:
            shown.append((begin + 1, times))
    if not shown:
        return
    axis.boxplot(
        [times for _, times in shown],
        positions=[number for number, _ in shown],
        widths=0.6 * together,
        whis=(1, 99),
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": COLOURS[1]},
        medianprops={"color": COLOURS[0], "linewidth": 1.6},
        manage_ticks=len(shown) <= 20,
    )
    by = "round" if together == 1 else f"{together} rounds"
    axis.set_title(f"response time by {by}: median, quartiles, 1 % to 99 %", loc="left")
    axis.set_xlabel("round")
    axis.set_ylabel("ms")
    set_time_scale(axis, array("d", (ms for _, times in shown for ms in times)))


def percentiles(axis: Any, results: Sequence[Result]) -> None:
    """Draw percentiles on an axis where each further nine takes the same room."""
    one_result = len(results) == 1
    drawn = _some(results)
    deepest = 1.0
    index = 0
    for result in drawn:
        every = [name for name in result.latency if name != "lateness"]
        for name in every if one_result else [result.main_latency or ""]:
            if not result.latency.get(name):
                continue
            histogram = result.latency[name]
            nines = [step / 50 for step in range(int(50 * math.log10(histogram.count + 1)) + 1)]
            nines = [depth for depth in nines if depth <= _MOST_NINES]
            times = [histogram.percentile(100 * (1 - 10**-depth)) / 1e6 for depth in nines]
            title = name.replace("_", " ") if one_result else label(result, results)
            shade = _COLOUR_OF[name] if one_result else colour(index, len(drawn))
            axis.plot(nines, times, color=shade, label=title)
            deepest = max(deepest, nines[-1])
            index += 1
    ticks = [depth for depth in range(_MOST_NINES + 1) if depth <= deepest]
    names_of_ticks = ["0", "90", "99", "99.9", "99.99", "99.999", "99.9999"]
    axis.set_xticks([math.log10(2), *ticks])
    axis.set_xticklabels(["50", *names_of_ticks[: len(ticks)]])
    axis.set_xlim(0, deepest)
    set_log(axis, "y")
    axis.set_title(f"percentiles{_of_how_many(drawn, results)}", loc="left")
    axis.set_xlabel("percentile")
    axis.set_ylabel("ms")
    many = len(drawn) > len(COLOURS)
    axis.legend(loc="best", framealpha=0.9, fontsize=6.5 if many else None, ncols=1 + many)


def _main(result: Result) -> Histogram:
    return result.latency[result.main_latency or ""]


def _draw_percentile_lines(axis: Any, results: Sequence[Result], x: Callable[[Any], float]) -> None:
    """Draw p50, p99 and p99.9 of each file, as a line through its steps in order of load.

    Beyond saturation the throughput may fall; the line then turns back.
    """
    files = _by_file([result for result in results if result.main_latency])
    for number, (name, steps) in enumerate(files.items()):
        steps.sort(key=lambda one: (one.workload["connections"], one.workload["rate"] or 0))
        for index, percent in enumerate((50, 99, 99.9)):
            axis.plot(
                [x(one) for one in steps],
                [_main(one).percentile(percent) / 1e6 for one in steps],
                "o" + ("-", "--", ":")[index if len(files) > 1 else 0],
                markersize=3.5,
                color=COLOURS[index] if len(files) == 1 else colour(number, len(files)),
                label=f"{one_line(name)} p{percent:g}" if len(files) > 1 else f"p{percent:g}",
            )
    axis.set_ylabel("ms")
    set_log(axis, "y")
    axis.legend(loc="best", framealpha=0.9, fontsize=6.5 if len(files) > 2 else None)


def against_connections(axis: Any, results: Sequence[Result]) -> None:
    """Draw latency against the number of connections."""
    _draw_percentile_lines(axis, results, lambda one: float(one.workload["connections"]))
    set_log(axis, "x")
    axis.set_title("latency against concurrency", loc="left")
    axis.set_xlabel("connections")


def against_throughput(axis: Any, results: Sequence[Result]) -> None:
    """Draw latency against echoes per second."""
    _draw_percentile_lines(axis, results, lambda one: one.rate_per_s / 1000)
    axis.set_title("latency against throughput", loc="left")
    axis.set_xlabel("thousand echoes/s")


def over_time(axis: Any, results: Sequence[Result]) -> None:
    """Draw echoes/s and p99 over time; of a stream bytes/s."""
    is_stream = all(result.workload["mode"] == "stream" for result in results)
    every = all_series(results)
    drawn = _some(every)
    highest = 0.0
    named: set[str] = set()
    lines = []
    for result, series in drawn:
        shown = [one for one in series if one.duration_s > 0]
        amounts = [
            (one.bytes / 1e6 if is_stream else one.echoes / 1e3) / one.duration_s for one in shown
        ]
        name = ("throughput" if is_stream else "echoes/s") if len(results) == 1 else ""
        name = name or label(result, results)
        (line,) = axis.plot(
            [one.start_s + one.duration_s / 2 for one in shown],
            amounts,
            ".-",
            color=colour(_index_of(result, results), len(results)),
            alpha=1 if len(every) == len(results) else 0.6,
            label=name if name not in named else None,
        )
        if name not in named:
            lines.append(line)
        named.add(name)
        highest = max(highest, *amounts, 0.0)
    axis.set_ylim(0, 1.1 * highest or 1)
    each = ", each repeat" if len(every) > len(results) else ""
    axis.set_title(f"over time{each}{_of_how_many(drawn, every)}", loc="left")
    axis.set_xlabel("s of measurement")
    axis.set_ylabel("MB/s each way" if is_stream else "thousand echoes/s")
    series = every[0][1]
    if len(results) == len(every) == 1 and any(one.latency for one in series):
        times = [one.latency.percentile(99) / 1e6 if one.latency else None for one in series]
        time_axis = axis.twinx()
        lines += time_axis.plot(
            [one.start_s + one.duration_s / 2 for one in series],
            times,
            ".--",
            color=COLOURS[1],
            label="p99",
        )
        time_axis.set_ylabel("p99, ms", color=COLOURS[1])
        time_axis.set_ylim(0, 1.1 * max(ms or 0 for ms in times) or 1)
    # Beside the title: inside the axes, the legend would cover a line.
    axis.legend(
        handles=lines[:_MOST_NAMED],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=_MOST_NAMED,
        frameon=False,
        borderaxespad=0.2,
        fontsize=7.5,
    )


def _index_of(result: Result, results: Sequence[Result]) -> int:
    return next(index for index, one in enumerate(results) if one is result)

"""Pictures of results. Only this file knows matplotlib."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ...command import plural
from ...printable import one_line
from ..amounts import rate_text
from ..results.histogram import Histogram
from ..results.result import Interval, Result, Round, check_results
from ..results.together import unlike_machines

__all__ = ["plot", "set_log"]

T = TypeVar("T")

_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7b5ea7", "#3d3d3d")
_COLOUR_OF = {
    "response": _COLOURS[0],
    "service": _COLOURS[2],
    "connect": _COLOURS[3],
    "first_echo": _COLOURS[1],
}
_GREY = "#666666"
_MOST_NINES = 6
_MOST_TOLD = 6  # numbers of a sweep in the title
_MOST_NAMED = 4  # lines that the legend beside a title has room for
# However much a file holds: beyond these nobody could tell one from the other.
_MOST_LINES, _MOST_BOXES, _MOST_DOTS = 100, 100, 200_000


def plot(results: Sequence[Result], path: str | Path | BinaryIO, format: str | None = None) -> None:
    """Writes a picture, PNG or SVG by the file's name or `format`, of what is in these results.

    A burst: response time by connection; any: percentiles on a nines axis, and over time; several:
    latency against connections or throughput, a line for each file that they are of. Raises
    ValueError if there is nothing to draw or they cannot be combined, OSError if the file cannot
    be written, ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    check_results(results)
    panels = _panels(results)
    if not panels:
        raise ValueError("these results hold no latency to draw")
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style["text.parse_math"] = False  # what is not ours, such as a path with $ in it, is no formula
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(6.4 * columns, 4.2 * rows + 0.9), squeeze=False
        )
        try:
            flat = list(axes.flat)
            for draw, axis in zip(panels, flat, strict=False):
                draw(axis, results)
                axis.grid(True, color="#dddddd", linewidth=0.6)
                axis.set_axisbelow(True)
            for axis in flat[len(panels) :]:
                axis.set_visible(False)
            figure.suptitle(
                one_line(_title(results)),
                fontsize=11,
                fontweight="bold",
                x=0.01,
                ha="left",
            )
            figure.text(
                *(0.01, 0.008, one_line(_footer(results))),
                fontsize=7.5,
                color=_footer_colour(results),
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # it draws a box instead
                figure.tight_layout(rect=(0, 0.03, 1, 0.985))
                figure.savefig(path, dpi=120, format=format)
        finally:
            pyplot.close(figure)


def _panels(results: Sequence[Result]) -> list[Any]:
    panels: list[Any] = []
    if len(results) == 1 and results[0].rounds:
        panels += [_by_connection, _by_round]
    if any(result.main_latency for result in results):
        panels.append(_percentiles)
    if len({result.workload["connections"] for result in results}) > 1:
        panels += [_against_connections, _against_throughput]
    elif len(results) > 1 and any(result.main_latency for result in results):
        panels.append(_against_throughput)
    if any(len(series) > 1 for _, series in _all_series(results)):
        panels.append(_over_time)
    return panels


def _all_series(results: Sequence[Result]) -> list[tuple[Result, tuple[Interval, ...]]]:
    """Those over time; of repeats, each has its own."""
    return [
        (result, one.series)
        for result in results
        for one in (result.repeats or (result,))
        if one.series
    ]


def _title(results: Sequence[Result]) -> str:
    workloads = [result.workload for result in results]
    places = dict.fromkeys(one["uds"] or f"{one['host']}:{one['port']}" for one in workloads)
    where = next(iter(places)) if len(places) == 1 else f"{len(places)} servers"
    counts = sorted({one["connections"] for one in workloads})
    lengths = sorted({one["length"] for one in workloads})
    connections = "connection" if counts == [1] else "connections"
    return (
        f"{workloads[0]['mode']} at {where}: {_numbers(counts)} {connections} of "
        f"{_numbers(lengths)} B"
    )


def _numbers(numbers: Sequence[int]) -> str:
    """Those of a long sweep are told by its ends."""
    shown = [f"{number:,}" for number in numbers]
    return " / ".join(shown) if len(shown) <= _MOST_TOLD else f"{shown[0]} to {shown[-1]}"


def _footer(results: Sequence[Result]) -> str:
    reasons = [(result, reason) for result in results for reason in result.verdict.reasons]
    environment = results[0].environment
    where = f"Linux {environment.get('kernel')}, {environment.get('usable_cpus')} CPUs"
    if unlike := unlike_machines([result.environment for result in results]):
        where = _shortened(f"unlike machines: {'; '.join(unlike)}", 80)
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        result, first = reasons[0]
        if len(results) > 1:
            first = f"{_label(result, results)}: {first}"
        return f"NOT VALID: {_shortened(first, 130)}{more}   ({where})"
    return f"{where}, kecho {environment.get('kecho')}; the run's own checks found nothing wrong"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _footer_colour(results: Sequence[Result]) -> str:
    return _GREY if all(result.verdict.valid for result in results) else "#c1121f"


def _label(result: Result, results: Sequence[Result]) -> str:
    """Its file, where they are of several; its step, where the file has several."""
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


def _some(every: Sequence[T]) -> Sequence[T]:
    """As many, from the first on at even distances, as can be told apart."""
    return every[:: -(-len(every) // _MOST_LINES) or 1]


def _of_how_many(drawn: Sequence[object], every: Sequence[object]) -> str:
    return f", {len(drawn)} of {len(every)}" if len(drawn) < len(every) else ""


def _colour(index: int, total: int) -> Any:
    """One of so many that can be told apart."""
    if total <= len(_COLOURS):
        return _COLOURS[index]
    from matplotlib import colormaps

    return colormaps["turbo"]((index + 0.5) / total)


def _by_connection(axis: Any, results: Sequence[Result]) -> None:
    """Each connection in its own place: a slow one stands out, whenever it finished."""
    rounds = results[0].rounds
    for name, title, colour in (
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
            color=colour,
            label=title,
            rasterized=True,
        )
    step = _step_of(rounds)
    thinned = f", the slowest of each {step}" if step > 1 else ""
    axis.set_title(f"by connection, every round{thinned}", loc="left")
    axis.set_xlabel("connection number")
    axis.set_ylabel("ms")
    _set_time_scale(axis, _dots(rounds, "response_ns")[1])
    legend = axis.legend(loc="best", markerscale=5, framealpha=0.9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _step_of(rounds: Sequence[Round]) -> int:
    return -(-sum(len(one.response_ns) for one in rounds) // _MOST_DOTS)


def _dots(rounds: Sequence[Round], name: str) -> tuple[array[int], array[float]]:
    """Connection numbers and ms. Where there are too many, of so many neighbours the slowest: a
    slow one is never left out."""
    step = _step_of(rounds)
    numbers, times = array("L"), array("d")
    every = (pair for one in rounds for pair in enumerate(getattr(one, name)) if pair[1])
    while some := list(islice(every, step)):
        number, ns = max(some, key=itemgetter(1))
        numbers.append(number)
        times.append(ns / 1e6)
    return numbers, times


def _by_round(axis: Any, results: Sequence[Result]) -> None:
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
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": _COLOURS[1]},
        medianprops={"color": _COLOURS[0], "linewidth": 1.6},
        manage_ticks=len(shown) <= 20,
    )
    by = "round" if together == 1 else f"{together} rounds"
    axis.set_title(f"response time by {by}: median, quartiles, 1 % to 99 %", loc="left")
    axis.set_xlabel("round")
    axis.set_ylabel("ms")
    _set_time_scale(axis, array("d", (ms for _, times in shown for ms in times)))


def _percentiles(axis: Any, results: Sequence[Result]) -> None:
    """On the nines axis each further nine takes the same room, so that the tail can be seen."""
    import math

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
            title = name.replace("_", " ") if one_result else _label(result, results)
            colour = _COLOUR_OF[name] if one_result else _colour(index, len(drawn))
            axis.plot(nines, times, color=colour, label=title)
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
    many = len(drawn) > len(_COLOURS)
    axis.legend(loc="best", framealpha=0.9, fontsize=6.5 if many else None, ncols=1 + many)


def _main(result: Result) -> Histogram:
    return result.latency[result.main_latency or ""]


def _draw_percentile_lines(axis: Any, results: Sequence[Result], x: Callable[[Any], float]) -> None:
    """A line goes from step to step of a file, as the load rises: beyond saturation the throughput
    may fall, and the line turns back."""
    files = _by_file([result for result in results if result.main_latency])
    for number, (name, steps) in enumerate(files.items()):
        steps.sort(key=lambda one: (one.workload["connections"], one.workload["rate"] or 0))
        for index, percent in enumerate((50, 99, 99.9)):
            axis.plot(
                [x(one) for one in steps],
                [_main(one).percentile(percent) / 1e6 for one in steps],
                "o" + ("-", "--", ":")[index if len(files) > 1 else 0],
                markersize=3.5,
                color=_COLOURS[index] if len(files) == 1 else _colour(number, len(files)),
                label=f"{one_line(name)} p{percent:g}" if len(files) > 1 else f"p{percent:g}",
            )
    axis.set_ylabel("ms")
    set_log(axis, "y")
    axis.legend(loc="best", framealpha=0.9, fontsize=6.5 if len(files) > 2 else None)


def _against_connections(axis: Any, results: Sequence[Result]) -> None:
    _draw_percentile_lines(axis, results, lambda one: float(one.workload["connections"]))
    set_log(axis, "x")
    axis.set_title("latency against concurrency", loc="left")
    axis.set_xlabel("connections")


def _against_throughput(axis: Any, results: Sequence[Result]) -> None:
    _draw_percentile_lines(axis, results, lambda one: one.rate_per_s / 1000)
    axis.set_title("latency against throughput", loc="left")
    axis.set_xlabel("thousand echoes/s")


def _over_time(axis: Any, results: Sequence[Result]) -> None:
    """Echoes/s and p99; of a stream bytes/s, which is what it is about."""
    is_stream = all(result.workload["mode"] == "stream" for result in results)
    every = _all_series(results)
    drawn = _some(every)
    highest = 0.0
    named: set[str] = set()
    lines = []
    for result, series in drawn:
        shown = [one for one in series if one.duration_s > 0]
        amounts = [
            (one.bytes / 1e6 if is_stream else one.echoes / 1e3) / one.duration_s for one in shown
        ]
        label = ("throughput" if is_stream else "echoes/s") if len(results) == 1 else ""
        label = label or _label(result, results)
        (line,) = axis.plot(
            [one.start_s + one.duration_s / 2 for one in shown],
            amounts,
            ".-",
            color=_colour(_index_of(result, results), len(results)),
            alpha=1 if len(every) == len(results) else 0.6,
            label=label if label not in named else None,
        )
        if label not in named:
            lines.append(line)
        named.add(label)
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
            color=_COLOURS[1],
            label="p99",
        )
        time_axis.set_ylabel("p99, ms", color=_COLOURS[1])
        time_axis.set_ylim(0, 1.1 * max(ms or 0 for ms in times) or 1)
    # Beside the title: within, it would lie on one line or the other.
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


def _set_time_scale(axis: Any, times: array[float]) -> None:
    """Logarithmic when a few outliers would press the rest flat."""
    some = sorted(times[:: -(-len(times) // _MOST_DOTS) or 1])
    if times and max(times) > 20 * some[len(some) // 2]:
        set_log(axis, "y")
    else:
        axis.set_ylim(bottom=0)


def set_log(axis: Any, which: str) -> None:
    """A logarithmic axis with plain numbers; those between the powers of ten where few are seen."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    class Plain(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    axis.set(**{f"{which}scale": "log"})
    one = getattr(axis, f"{which}axis")
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    one.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))

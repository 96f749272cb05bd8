"""Pictures of results. Only this file knows matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .result import Result

__all__ = ["plot"]

_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7b5ea7", "#3d3d3d")
_COLOUR_OF = {
    "response": _COLOURS[0],
    "service": _COLOURS[2],
    "connect": _COLOURS[3],
    "first_echo": _COLOURS[1],
}
_GREY = "#666666"
_MOST_NINES = 6


def plot(results: Sequence[Result], path: str | Path | BinaryIO, format: str | None = None) -> None:
    """Writes a picture, PNG or SVG by the file's name or `format`, of what is in these results.

    A burst: response time by connection; any: percentiles on a nines axis, and over time; several:
    latency against connections or throughput. Raises ValueError if there is nothing to draw,
    OSError if the file cannot be written, ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(results)
    if not panels:
        raise ValueError("these results hold no latency to draw")
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
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
            figure.suptitle(_title(results), fontsize=11, fontweight="bold", x=0.01, ha="left")
            figure.text(0.01, 0.008, _footer(results), fontsize=7.5, color=_footer_colour(results))
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
    if any(len(result.series) > 1 for result in results):
        panels.append(_over_time)
    return panels


def _title(results: Sequence[Result]) -> str:
    workload = results[0].workload
    where = workload["uds"] or f"{workload['host']}:{workload['port']}"
    counts = sorted({result.workload["connections"] for result in results})
    return (
        f"{workload['mode']} at {where}: "
        f"{' / '.join(f'{count:,}' for count in counts)} connections of {workload['length']:,} B"
    )


def _footer(results: Sequence[Result]) -> str:
    reasons = [reason for result in results for reason in result.verdict.reasons]
    environment = results[0].environment
    where = f"Linux {environment.get('kernel')}, {environment.get('usable_cpus')} CPUs"
    if reasons:
        return f"NOT VALID: {reasons[0][:130]}   ({where})"
    return f"{where}, kecho {environment.get('kecho')}; the run's own checks found nothing wrong"


def _footer_colour(results: Sequence[Result]) -> str:
    return _GREY if all(result.verdict.valid for result in results) else "#c1121f"


def _label(result: Result, results: Sequence[Result]) -> str:
    if len({one.workload["connections"] for one in results}) == len(results):
        return f"{result.workload['connections']:,} connections"
    if result.workload["rate"]:
        return f"{result.workload['rate']:,.0f}/s"
    return f"{result.rate_per_s:,.0f} echoes/s"


def _by_connection(axis: Any, results: Sequence[Result]) -> None:
    """Each connection in its own place: a slow one stands out, whenever it finished."""
    rounds = results[0].rounds
    for name, title, colour in (
        ("response_ns", "response, from the instant", _COLOUR_OF["response"]),
        ("connect_ns", "connect", _COLOUR_OF["connect"]),
        ("first_echo_ns", "first echo, from send", _COLOUR_OF["first_echo"]),
    ):
        numbers: list[int] = []
        times: list[float] = []
        for one in rounds:
            for number, ns in enumerate(getattr(one, name)):
                if ns:
                    numbers.append(number)
                    times.append(ns / 1e6)
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
    axis.set_title("by connection, every round", loc="left")
    axis.set_xlabel("connection number")
    axis.set_ylabel("ms")
    _set_time_scale(axis, [ns / 1e6 for one in rounds for ns in one.response_ns if ns])
    legend = axis.legend(loc="best", markerscale=5, framealpha=0.9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _by_round(axis: Any, results: Sequence[Result]) -> None:
    rounds = results[0].rounds
    answered = [[ns / 1e6 for ns in one.response_ns if ns] for one in rounds]
    shown = [(number, times) for number, times in enumerate(answered, 1) if times]
    if not shown:
        return
    axis.boxplot(
        [times for _, times in shown],
        positions=[number for number, _ in shown],
        widths=0.6,
        whis=(1, 99),
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": _COLOURS[1]},
        medianprops={"color": _COLOURS[0], "linewidth": 1.6},
        manage_ticks=len(shown) <= 20,
    )
    axis.set_title("response time by round: median, quartiles, 1 % to 99 %", loc="left")
    axis.set_xlabel("round")
    axis.set_ylabel("ms")
    _set_time_scale(axis, [ms for _, times in shown for ms in times])


def _percentiles(axis: Any, results: Sequence[Result]) -> None:
    """On the nines axis each further nine takes the same room, so that the tail can be seen."""
    import math

    one_result = len(results) == 1
    deepest = 1.0
    index = 0
    for result in results:
        every = [name for name in result.latency if name != "lateness"]
        for name in every if one_result else [result.main_latency or ""]:
            if not result.latency.get(name):
                continue
            histogram = result.latency[name]
            nines = [step / 50 for step in range(int(50 * math.log10(histogram.count + 1)) + 1)]
            nines = [depth for depth in nines if depth <= _MOST_NINES]
            times = [histogram.percentile(100 * (1 - 10**-depth)) / 1e6 for depth in nines]
            title = name.replace("_", " ") if one_result else _label(result, results)
            colour = _COLOUR_OF[name] if one_result else _COLOURS[index % len(_COLOURS)]
            axis.plot(nines, times, color=colour, label=title)
            deepest = max(deepest, nines[-1])
            index += 1
    ticks = [depth for depth in range(_MOST_NINES + 1) if depth <= deepest]
    names_of_ticks = ["0", "90", "99", "99.9", "99.99", "99.999", "99.9999"]
    axis.set_xticks([math.log10(2), *ticks])
    axis.set_xticklabels(["50", *names_of_ticks[: len(ticks)]])
    axis.set_xlim(0, deepest)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_plain_numbers())
    axis.set_title("percentiles", loc="left")
    axis.set_xlabel("percentile")
    axis.set_ylabel("ms")
    axis.legend(loc="best", framealpha=0.9)


def _with_latency(results: Sequence[Result], key: Any) -> list[tuple[float, Any]]:
    """(x, histogram) of each result that has a latency, in ascending order."""
    points = [
        (float(key(result)), result.latency[result.main_latency])
        for result in results
        if result.main_latency
    ]
    return sorted(points, key=lambda point: point[0])


def _draw_percentile_lines(axis: Any, points: list[tuple[float, Any]]) -> None:
    for index, percent in enumerate((50, 99, 99.9)):
        axis.plot(
            [x for x, _ in points],
            [histogram.percentile(percent) / 1e6 for _, histogram in points],
            "o-",
            markersize=3.5,
            color=_COLOURS[index],
            label=f"p{percent:g}",
        )
    axis.set_ylabel("ms")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_plain_numbers())
    axis.legend(loc="best", framealpha=0.9)


def _against_connections(axis: Any, results: Sequence[Result]) -> None:
    _draw_percentile_lines(axis, _with_latency(results, lambda one: one.workload["connections"]))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_plain_numbers())
    axis.set_title("latency against concurrency", loc="left")
    axis.set_xlabel("connections")


def _against_throughput(axis: Any, results: Sequence[Result]) -> None:
    points = _with_latency(results, lambda one: one.rate_per_s / 1000)
    _draw_percentile_lines(axis, points)
    axis.set_title("latency against throughput", loc="left")
    axis.set_xlabel("thousand echoes/s")


def _over_time(axis: Any, results: Sequence[Result]) -> None:
    rate_axis = axis
    for index, result in enumerate(results):
        middles = [one.start_s + one.duration_s / 2 for one in result.series]
        rates = [one.echoes / one.duration_s / 1000 for one in result.series if one.duration_s > 0]
        if len(rates) != len(middles):
            continue
        label = "echoes/s" if len(results) == 1 else _label(result, results)
        colour = _COLOURS[index % len(_COLOURS)]
        rate_axis.plot(middles, rates, ".-", color=colour, label=label)
    rate_axis.set_ylim(bottom=0)
    rate_axis.set_title("over time", loc="left")
    rate_axis.set_xlabel("s of measurement")
    rate_axis.set_ylabel("thousand echoes/s")
    series = results[0].series
    if len(results) == 1 and any(one.latency for one in series):
        time_axis = rate_axis.twinx()
        time_axis.plot(
            [one.start_s + one.duration_s / 2 for one in series],
            [one.latency.percentile(99) / 1e6 if one.latency else None for one in series],
            ".--",
            color=_COLOURS[1],
            label="p99",
        )
        time_axis.set_ylabel("p99, ms", color=_COLOURS[1])
        time_axis.set_ylim(bottom=0)
    rate_axis.legend(loc="best", framealpha=0.9)


def _set_time_scale(axis: Any, times: list[float]) -> None:
    """Logarithmic when a few outliers would press the rest flat."""
    if times and max(times) > 20 * sorted(times)[len(times) // 2]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain_numbers())
    else:
        axis.set_ylim(bottom=0)


def _plain_numbers() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")

"""Pictures of results, as PNG or SVG. They need matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...printable import one_line
from ..results.result import Result, check_results
from ..results.together import machine_differences
from . import panels

__all__ = ["plot"]

_GREY = "#666666"
_MOST_TOLD = 6  # numbers of a sweep in the title


def plot(results: Sequence[Result], path: str | Path | BinaryIO, format: str | None = None) -> None:
    """Write a picture of some results, as PNG or SVG by the file's name or `format`.

    It shows percentiles and the course over time; of a burst also the response time of each
    connection; of several results latency against connections or throughput, with a line for each
    file. Raises ValueError if there is nothing to draw or the results cannot be combined, OSError
    if the file cannot be written, ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    check_results(results)
    chosen = _panels(results)
    if not chosen:
        raise ValueError("these results hold no latency to draw")
    columns = 1 if len(chosen) == 1 else 2
    rows = -(-len(chosen) // columns)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style["text.parse_math"] = False  # a path with $ in it is no formula
    with matplotlib.rc_context():
        # Not by what a matplotlibrc says: the one of the current directory may be anybody's, and
        # name functions to call (figure.hooks).
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(6.4 * columns, 4.2 * rows + 0.9), squeeze=False
        )
        try:
            flat = list(axes.flat)
            for draw, axis in zip(chosen, flat, strict=False):
                draw(axis, results)
                axis.grid(True, color="#dddddd", linewidth=0.6)
                axis.set_axisbelow(True)
            for axis in flat[len(chosen) :]:
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
                warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn instead
                figure.tight_layout(rect=(0, 0.03, 1, 0.985))
                figure.savefig(path, dpi=120, format=format)
        finally:
            pyplot.close(figure)


def _panels(results: Sequence[Result]) -> list[Any]:
    """Return the functions that draw what these results have."""
    found: list[Any] = []
    if len(results) == 1 and results[0].rounds:
        found += [panels.by_connection, panels.by_round]
    if any(result.main_latency for result in results):
        found.append(panels.percentiles)
    if len({result.workload["connections"] for result in results}) > 1:
        found += [panels.against_connections, panels.against_throughput]
    elif len(results) > 1 and any(result.main_latency for result in results):
        found.append(panels.against_throughput)
    if any(len(series) > 1 for _, series in panels.all_series(results)):
        found.append(panels.over_time)
    return found


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
    """Return numbers as text; of a long sweep only the first and the last."""
    shown = [f"{number:,}" for number in numbers]
    return " / ".join(shown) if len(shown) <= _MOST_TOLD else f"{shown[0]} to {shown[-1]}"


def _footer(results: Sequence[Result]) -> str:
    reasons = [(result, reason) for result in results for reason in result.verdict.reasons]
    environment = results[0].environment
    where = f"Linux {environment.get('kernel')}, {environment.get('usable_cpus')} CPUs"
    if differences := machine_differences([result.environment for result in results]):
        where = _shortened(f"different machines: {'; '.join(differences)}", 80)
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        result, first = reasons[0]
        if len(results) > 1:
            first = f"{panels.label(result, results)}: {first}"
        return f"NOT VALID: {_shortened(first, 130)}{more}   ({where})"
    return f"{where}, kecho {environment.get('kecho')}; the run's own checks found nothing wrong"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _footer_colour(results: Sequence[Result]) -> str:
    return _GREY if all(result.verdict.valid for result in results) else "#c1121f"

"""A picture for each workload: every run a dot, hollow where its verdict spoils the figure. Only
this file knows matplotlib, and imports it late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from kecho.bench.output.axes import set_log

from .measure import Measured
from .summary import figure
from .workloads import METRICS

__all__ = ["draw"]

_COLOURS = {True: "#1b6ca8", False: "#8a8a8a"}  # kecho's own, others'
_UNITS = {"rate": (1e-3, "thousand echoes/s"), "cpu": (1e-3, "µs of server CPU per echo")}
_TIME, _LONG_TIME = (1e-3, "µs"), (1e-6, "ms")
_LONG_NS = 1e7
_LOG_FROM = 8  # times the smallest: then the axis is logarithmic


def draw(measured: Measured, path: str | Path | BinaryIO, footer: str) -> None:
    """PNG or SVG by the file's name. ValueError if nothing was measured, ImportError without
    matplotlib."""
    names = [
        name
        for name in measured.scenario.contestants
        if any(run.result is not None for run in measured.of(name))
    ]
    if not names:
        raise ValueError(f"{measured.scenario.name}: nothing was measured")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = measured.scenario.metrics
    columns = 2
    rows = -(-len(metrics) // columns)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        pyplot_figure, axes = pyplot.subplots(
            rows, columns, figsize=(12, (0.32 * len(names) + 1.3) * rows + 0.8), squeeze=False
        )
        try:
            for metric, axis in zip(metrics, axes.flat, strict=False):
                _panel(axis, measured, names, metric)
            for axis in list(axes.flat)[len(metrics) :]:
                axis.set_visible(False)
            pyplot_figure.suptitle(
                measured.title, fontsize=11, fontweight="bold", x=0.01, ha="left"
            )
            footer += "; bar: mean of the valid runs (of all, if none is), hollow: not valid"
            pyplot_figure.text(0.01, 0.008, footer, fontsize=7.5, color="#666666", parse_math=False)
            pyplot_figure.tight_layout(rect=(0, 0.03, 1, 0.985))
            pyplot_figure.savefig(path, dpi=120)
        finally:
            pyplot.close(pyplot_figure)


def _panel(axis: Any, measured: Measured, names: Sequence[str], metric: str) -> None:
    values = [
        value
        for name in names
        for run in measured.of(name)
        if (value := run.value(metric)) is not None
    ]
    is_long = max(values, default=0.0) >= _LONG_NS
    scale, unit = _UNITS.get(metric, _LONG_TIME if is_long else _TIME)
    for place, name in enumerate(names):
        colour = _COLOURS[name.startswith("kecho")]
        for run in measured.of(name):
            value = run.value(metric)
            if value is None:
                continue
            axis.plot(
                value * scale,
                place,
                "o",
                markersize=5,
                markeredgecolor=colour,
                markerfacecolor="none" if run.invalid_because(metric) else colour,
                alpha=0.7,
            )
        mean = figure(measured, name, metric).mean
        if mean is not None:
            axis.plot(mean * scale, place, "|", markersize=16, markeredgewidth=2, color=colour)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    title, more_is_better = METRICS[metric]
    axis.set_title(f"{title} ({'more' if more_is_better else 'less'} is better)", loc="left")
    axis.set_xlabel(unit)
    if values and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        set_log(axis, "x")
    else:
        axis.set_xlim(left=0)
    axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)

"""What all pictures share: their colours, and axes with plain numbers."""

from __future__ import annotations

from array import array
from typing import Any

__all__ = ["COLOURS", "MOST_DOTS", "colour", "set_log", "set_time_scale"]

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7b5ea7", "#3d3d3d")
MOST_DOTS = 200_000  # on one picture; more could not be told apart


def colour(index: int, total: int) -> Any:
    """Return the colour of one of `total` lines, each different from the others."""
    if total <= len(COLOURS):
        return COLOURS[index]
    from matplotlib import colormaps

    return colormaps["turbo"]((index + 0.5) / total)


def set_time_scale(axis: Any, times: array[float]) -> None:
    """Make the y axis logarithmic if a few outliers would press the rest flat."""
    some = sorted(times[:: -(-len(times) // MOST_DOTS) or 1])
    if times and max(times) > 20 * some[len(some) // 2]:
        set_log(axis, "y")
    else:
        axis.set_ylim(bottom=0)


def set_log(axis: Any, which: str) -> None:
    """Make an axis logarithmic, with plain numbers.

    Numbers between the powers of ten are shown where there are few powers of ten.
    """
    from matplotlib.ticker import FuncFormatter, LogFormatter

    class Plain(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    axis.set(**{f"{which}scale": "log"})
    one = getattr(axis, f"{which}axis")
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    one.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))

"""Two results side by side: ratios, and how sure they are. Pure functions of Results."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .condition import METRICS, Condition, metric_of
from .report import duration_text
from .result import Result

__all__ = ["Comparison", "compare", "failed_conditions", "text"]

_RESAMPLES = 4000
_CONFIDENCE = 0.95
_SEED = 1  # the same two files always give the same interval


@dataclass(frozen=True)
class Comparison:
    """first, second: means over the repeats; ratio: of the second to the first. low, high: the
    95 % bootstrap confidence interval of the ratio; None when one has fewer than two repeats."""

    metric: str
    first: float
    second: float
    ratio: float | None
    low: float | None
    high: float | None

    @property
    def differs(self) -> bool | None:
        """Whether the interval leaves out 1; None without one."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 1.0 <= self.high


def compare(first: Result, second: Result) -> list[Comparison]:
    """Every metric that both have, but for errors."""
    comparisons = []
    for metric in METRICS:
        if metric == "errors":
            continue
        try:
            samples = [
                [metric_of(one, metric) for one in result.repeats or (result,)]
                for result in (first, second)
            ]
        except ValueError:
            continue
        a, b = map(fmean, samples)
        low, high = _interval(*samples)
        comparisons.append(Comparison(metric, a, b, b / a if a else None, low, high))
    return comparisons


def _interval(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Percentile bootstrap (Efron, 1979): both sets are drawn again, with replacement."""
    if min(len(first), len(second)) < 2 or min(first) <= 0:
        return None, None
    draw = random.Random(_SEED)
    ratios = sorted(
        fmean(draw.choices(second, k=len(second))) / fmean(draw.choices(first, k=len(first)))
        for _ in range(_RESAMPLES)
    )
    outside = round(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return ratios[outside], ratios[-1 - outside]


def failed_conditions(
    conditions: Sequence[Condition], baseline: Result, result: Result
) -> list[Condition]:
    """Those that are true of the second result: they name what must not be."""
    return [one for one in conditions if one.holds(result, baseline)]


def text(first: Result, second: Result) -> str:
    rows: list[list[str]] = [["", "A", "B", "B / A", "95 % interval", ""]]
    for one in compare(first, second):
        shown = [
            f"{value:,.0f}/s" if one.metric == "rate" else duration_text(value)
            for value in (one.first, one.second)
        ]
        interval = f"{one.low:.3f} to {one.high:.3f}" if one.low is not None else "-"
        said = {None: "", True: "differs", False: "no difference shown"}[one.differs]
        ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
        rows.append([one.metric, *shown, ratio, interval, said])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5], strict=True)]
            + [row[5]]
        ).rstrip()
        for row in rows
    ]
    for name, result in (("A", first), ("B", second)):
        count = len(result.repeats) or 1
        if count < 2:
            lines.append(f"{name} is one run: no interval; measure with --repeat 5 or more")
        lines += [f"{name} is NOT VALID: {reason}" for reason in result.verdict.reasons]
    if dict(first.workload) != dict(second.workload):
        names = sorted(
            name
            for name in {*first.workload, *second.workload} - {"host", "port", "uds"}
            if first.workload.get(name) != second.workload.get(name)
        )
        if names:
            lines.append(f"the workloads differ: {', '.join(names)}")
    return "\n".join(lines) + "\n"

"""Two results side by side: ratios, and how sure they are. Pure functions of Results."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ...printable import one_line
from ..amounts import duration_text, rate_text
from .condition import METRICS, Condition, metric_of
from .result import Result
from .together import check_alike, unlike_machines

__all__ = [
    *("REPEATS_LEAST", "Comparison", "compare", "compare_samples", "failed_conditions", "interval"),
    "text",
]

_RESAMPLES = 4000
_DRAWS_MOST = 4 * _RESAMPLES  # those that differ in nothing are no help
_CONFIDENCE = 0.95
_NORMAL = 1.959964  # quantile of the normal distribution for it
_REPEATS_DRAWN = 100  # with more, the normal distribution says the same in no time
REPEATS_LEAST = 4  # with fewer, nothing can be said of how much they vary
_SEED = 1  # the same two files always give the same interval


@dataclass(frozen=True)
class Comparison:
    """first, second: means over the repeats; ratio: of the second to the first. low, high: the
    95 % bootstrap confidence interval of the ratio; None when one has fewer than four repeats."""

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


def compare(first: Result, second: Result, more: Sequence[str] = ()) -> list[Comparison]:
    """Every metric that both have, but for errors; `more` are further percentiles. ValueError if
    they cannot be combined: a service time is not to be divided by a response time."""
    check_alike(
        [one.workload["mode"] for one in (first, second)],
        [one.main_latency for one in (first, second)],
        ("A", "B"),
    )
    comparisons = []
    for metric in dict.fromkeys((*METRICS, *more)):
        if metric == "errors":
            continue
        try:
            samples = [
                [metric_of(one, metric) for one in result.repeats or (result,)]
                for result in (first, second)
            ]
        except ValueError:
            continue
        comparisons.append(compare_samples(metric, *samples))
    return comparisons


def compare_samples(metric: str, first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Of a figure's samples, one or more from each side."""
    a, b = fmean(first), fmean(second)
    return Comparison(metric, a, b, b / a if a else None, *interval(first, second))


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Of the ratio of means, second to first: bootstrap-t of its logarithm (Efron and Tibshirani,
    1993, 12.5).

    Both sets are drawn again, with replacement, and each draw is studentised: percentiles of the
    draws alone are too narrow for so few repeats. Of more than a hundred repeats, it is by the
    normal distribution. None without four of each, or if one is not positive and finite.
    """
    every = (*first, *second)
    if min(len(first), len(second)) < REPEATS_LEAST or not all(0 < one < math.inf for one in every):
        return None, None
    centre, error = _log_ratio(first, second)
    if error == 0:
        return math.exp(centre), math.exp(centre)
    if max(len(first), len(second)) > _REPEATS_DRAWN:
        return math.exp(centre - _NORMAL * error), math.exp(centre + _NORMAL * error)
    draw = random.Random(_SEED)
    studentised: list[float] = []
    for _ in range(_DRAWS_MOST):
        drawn, error_drawn = _log_ratio(
            draw.choices(first, k=len(first)), draw.choices(second, k=len(second))
        )
        if error_drawn > 0:
            studentised.append((drawn - centre) / error_drawn)
        if len(studentised) == _RESAMPLES:
            break
    else:  # figures so nearly alike that most draws differ in nothing
        return None, None
    studentised.sort()
    outside = round(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return (
        math.exp(centre - error * studentised[-1 - outside]),
        math.exp(centre - error * studentised[outside]),
    )


def _log_ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """log(mean of second / mean of first), and its standard error by the delta method."""
    a, b = fmean(first), fmean(second)
    squared = _squared_error(first, a) + _squared_error(second, b)
    return math.log(b / a), math.sqrt(squared)


def _squared_error(samples: Sequence[float], mean: float) -> float:
    """Of the mean, relative to it. statistics.variance() takes fractions, and so far too long."""
    count = len(samples)
    deviations = math.fsum((one / mean - 1) ** 2 for one in samples)
    return deviations / (count - 1) / count


def failed_conditions(
    conditions: Sequence[Condition], baseline: Result, result: Result
) -> tuple[list[Condition], list[str]]:
    """Those that are true of the second result, which must not be; and why others cannot be told,
    a line each."""
    failed, unknown = [], []
    for one in conditions:
        try:
            if one.holds(result, baseline):
                failed.append(one)
        except ValueError as error:
            unknown.append(f"--fail-if {one.text}: {error}")
    return failed, unknown


def text(first: Result, second: Result, more: Sequence[str] = ()) -> str:
    """The table. more: percentiles that it has beside the usual ones."""
    times = (first.main_latency or second.main_latency or "").replace("_", " ")
    rows: list[list[str]] = [[times, "A", "B", "B / A", "95 % interval", ""]]
    for one in compare(first, second, more):
        shown = [
            f"{rate_text(value)}/s" if one.metric == "rate" else duration_text(value)
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
        if count < REPEATS_LEAST:
            runs = "one run" if count == 1 else f"{count} runs"
            lines.append(f"{name} is {runs}: no interval; measure with --repeat 5 or more")
        lines += [f"{name} is NOT VALID: {reason}" for reason in result.verdict.reasons]
    for unlike in unlike_machines([first.environment, second.environment]):
        lines.append(f"A and B are of unlike machines: {unlike}")
    if dict(first.workload) != dict(second.workload):
        names = sorted(
            name
            for name in {*first.workload, *second.workload} - {"host", "port", "uds"}
            if first.workload.get(name) != second.workload.get(name)
        )
        if names:
            lines.append(f"the workloads differ: {', '.join(names)}")
    return "\n".join(map(one_line, lines)) + "\n"

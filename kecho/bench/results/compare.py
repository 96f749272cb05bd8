"""The comparison of two results: ratios with confidence intervals. Pure functions of Results."""

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
from .together import check_alike, machine_differences

__all__ = [
    *("REPEATS_LEAST", "Comparison", "compare", "compare_samples", "failed_conditions", "interval"),
    "text",
]

_RESAMPLES = 4000
_DRAWS_MOST = 4 * _RESAMPLES  # draws without any variation are not used
_CONFIDENCE = 0.95
_NORMAL = 1.959964  # the normal distribution's quantile for this confidence
_REPEATS_DRAWN = 100  # with more repeats, the normal distribution gives the same, and faster
REPEATS_LEAST = 4  # with fewer, their variation is not known
_SEED = 1  # fixed: the same two files always give the same interval


@dataclass(frozen=True)
class Comparison:
    """One metric of two results.

    first, second: means over the repeats.
    ratio: of the second to the first; None if the first is 0.
    low, high: the 95 % bootstrap confidence interval of the ratio; None if a result has fewer than
        REPEATS_LEAST repeats.
    """

    metric: str
    first: float
    second: float
    ratio: float | None
    low: float | None
    high: float | None

    @property
    def differs(self) -> bool | None:
        """Whether the interval excludes 1; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 1.0 <= self.high


def compare(first: Result, second: Result, more: Sequence[str] = ()) -> list[Comparison]:
    """Compare every metric that both results have, except errors.

    more: further percentiles. Raises ValueError if the results cannot be combined: a service time
    cannot be compared with a response time.
    """
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
    """Compare one metric by its samples, at least one from each side."""
    a, b = fmean(first), fmean(second)
    return Comparison(metric, a, b, b / a if a else None, *interval(first, second))


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the confidence interval of the ratio of means, second to first.

    It is the bootstrap-t interval of the ratio's logarithm (Efron and Tibshirani, 1993, 12.5). Both
    sets are resampled with replacement, and each draw is studentised: for so few repeats, the
    percentiles of the draws alone are too narrow. With more than _REPEATS_DRAWN repeats, the normal
    distribution is used instead. Returns None, None with fewer than REPEATS_LEAST samples on a
    side, or if a sample is not positive and finite.
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
    else:  # the samples are so similar that most draws do not vary
        return None, None
    studentised.sort()
    outside = round(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return (
        math.exp(centre - error * studentised[-1 - outside]),
        math.exp(centre - error * studentised[outside]),
    )


def _log_ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return log(mean of second / mean of first), and its standard error by the delta method."""
    a, b = fmean(first), fmean(second)
    squared = _squared_error(first, a) + _squared_error(second, b)
    return math.log(b / a), math.sqrt(squared)


def _squared_error(samples: Sequence[float], mean: float) -> float:
    """Return the squared standard error of the mean, relative to the mean.

    statistics.variance() computes with fractions, which takes too long here.
    """
    count = len(samples)
    deviations = math.fsum((one / mean - 1) ** 2 for one in samples)
    return deviations / (count - 1) / count


def failed_conditions(
    conditions: Sequence[Condition], baseline: Result, result: Result
) -> tuple[list[Condition], list[str]]:
    """Return the conditions that are true of `result`, and why others cannot be evaluated.

    baseline: what relative conditions refer to. The second list has a line for each reason.
    """
    failed, unknown = [], []
    for one in conditions:
        try:
            if one.holds(result, baseline):
                failed.append(one)
        except ValueError as error:
            unknown.append(f"--fail-if {one.text}: {error}")
    return failed, unknown


def text(first: Result, second: Result, more: Sequence[str] = ()) -> str:
    """Return the comparison as a table. more: percentiles beside the usual ones."""
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
    for differences in machine_differences([first.environment, second.environment]):
        lines.append(f"A and B were measured on different machines: {differences}")
    if dict(first.workload) != dict(second.workload):
        names = sorted(
            name
            for name in {*first.workload, *second.workload} - {"host", "port", "uds"}
            if first.workload.get(name) != second.workload.get(name)
        )
        if names:
            lines.append(f"the workloads differ: {', '.join(names)}")
    return "\n".join(map(one_line, lines)) + "\n"

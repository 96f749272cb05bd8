"""Conditions on a result, such as ``p99<1ms`` or ``rate<0.95x``."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from .result import Result

__all__ = ["METRICS", "Condition", "is_percentile", "metric_of", "parse"]

METRICS = ("rate", "mean", "p50", "p90", "p99", "p99.9", "p99.99", "max", "errors")
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NS = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
_PATTERN = re.compile(
    r"\s*(?P<metric>[a-z][a-z0-9.]*)\s*(?P<operator><=|>=|<|>)\s*"
    r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>ns|us|µs|ms|s|/s|x|)\s*",
    re.ASCII,
)
_PERCENTILE = re.compile(r"p[0-9]{1,2}(\.[0-9]{1,4})?", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """A limit for one metric.

    metric: one of METRICS, or another percentile such as p95.
    value: in ns for times, in echoes/s for the rate; if relative, a factor of the baseline's value.
    """

    text: str
    metric: str
    operator: str
    value: float
    relative: bool

    def holds(self, result: Result, baseline: Result | None = None) -> bool:
        """Return whether the condition is true of `result`.

        Raises ValueError if a relative condition has no baseline, or a result lacks the metric.
        """
        limit = self.value
        if self.relative:
            if baseline is None:
                raise ValueError(f"{self.text!r} needs a result to compare with")
            limit *= metric_of(baseline, self.metric)
        return bool(_OPERATORS[self.operator](metric_of(result, self.metric), limit))


def parse(text: str) -> Condition:
    """Read a condition. Raise ValueError, with a reason of one line, if it is malformed."""
    found = _PATTERN.fullmatch(text)
    if found is None or not (found["metric"] in METRICS or is_percentile(found["metric"])):
        raise ValueError(
            "must be a condition on rate, errors, mean, max or a percentile, such as p99<1ms, "
            f"rate<0.95x or errors>0 (got {text!r})"
        )
    metric, unit = found["metric"], found["unit"]
    value = float(found["number"])
    if unit != "x":
        allowed = {"rate": ("", "/s"), "errors": ("",)}.get(metric, tuple(_NS))
        if unit not in allowed:
            shown = " or ".join(one or "no unit" for one in (*allowed, "x"))
            raise ValueError(f"{text!r}: {metric} takes {shown}")
        value *= _NS.get(unit, 1.0)
    return Condition(text.strip(), metric, found["operator"], value, unit == "x")


def is_percentile(metric: str) -> bool:
    """Return whether a metric is p and a number between 0 and 100, with four decimals at most."""
    return bool(_PERCENTILE.fullmatch(metric)) and float(metric[1:]) > 0


def metric_of(result: Result, metric: str) -> float:
    """Return a metric of a result: one of METRICS, or another percentile.

    Times are those of the mode's main latency. Raises ValueError if the result has none, and in
    mode idle for the rate.
    """
    if metric == "errors":
        return float(result.error_count)
    mode = result.workload.get("mode")
    if metric == "rate" and mode != "idle":
        return result.rate_per_s
    if metric == "rate" or result.main_latency is None:
        raise ValueError(f"a run of mode {mode} has no {metric}")
    histogram = result.latency[result.main_latency]
    if metric == "mean":
        return histogram.mean
    if metric == "max":
        return float(histogram.max)
    return float(histogram.percentile(float(metric[1:])))

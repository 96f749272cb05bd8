"""What the runs come to: figures, ratios with intervals, goals. Pure functions of Measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kecho.bench.results.compare import Comparison, compare_samples

from .measure import Measured, Run, of_both
from .validity import are_enough, in_short
from .workloads import Goal

__all__ = ["Figure", "Outcome", "Ratio", "figure", "goals", "ratio"]


@dataclass(frozen=True)
class Figure:
    """Of one contestant: the mean over its valid runs (over all of them if none is), how many there
    are, and what was said against the others, most frequent first."""

    mean: float | None
    valid: int
    runs: int
    reasons: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        return are_enough(self.valid, self.runs)


@dataclass(frozen=True)
class Ratio:
    """comparison: None if either side is not valid; why not, then, in one line, and in a few words
    for a table."""

    comparison: Comparison | None
    why_not: str | None = None
    in_short: str | None = None

    @property
    def value(self) -> float | None:
        return None if self.comparison is None else self.comparison.ratio


@dataclass(frozen=True)
class Outcome:
    """met: None if that cannot be told. is_certain: the interval leaves out the limit."""

    goal: Goal
    ratio: Ratio
    met: bool | None
    is_certain: bool

    @property
    def text(self) -> str:
        if self.met is None:
            return "not to be told"
        said = "met" if self.met else "not met"
        return said if self.is_certain else f"{said}, within the noise"


def figure(measured: Measured, contestant: str, metric: str) -> Figure:
    return _figure(measured.of(contestant), metric)


def _figure(runs: Sequence[Run], metric: str) -> Figure:
    reasons = Counter(reason for run in runs for reason in run.invalid_because(metric))
    valid = _samples(runs, metric)
    shown = valid or [value for run in runs if (value := run.value(metric)) is not None]
    return Figure(
        fmean(shown) if shown else None,
        len(valid),
        len(runs),
        tuple(reason for reason, _ in reasons.most_common()),
    )


def _samples(runs: Sequence[Run], metric: str) -> list[float]:
    """Of the valid ones."""
    values = [run.value(metric) for run in runs if run.is_valid(metric)]
    return [value for value in values if value is not None]


def ratio(measured: Measured, subject: str, reference: str, metric: str) -> Ratio:
    """Of the subject's figure to the reference's, in the rounds that both were in."""
    for name in (subject, reference):
        if name in measured.absent:
            return Ratio(None, f"{name} is absent: {measured.absent[name]}", "absent")
    both = of_both(measured.runs, subject, reference)
    for name in (subject, reference):
        if not measured.of(name):
            return Ratio(None, f"{name} was not measured")
        one = _figure(both[name], metric)
        if not one.is_valid:
            why = one.reasons[0] if one.reasons else f"{name} has no {metric}"
            return Ratio(None, f"invalid ({name}: {why})", f"invalid ({name}: {in_short(why)})")
    first, second = (_samples(both[name], metric) for name in (reference, subject))
    return Ratio(compare_samples(metric, first, second))


def goals(measured: Measured) -> list[Outcome]:
    outcomes = []
    for goal in measured.scenario.goals:
        found = ratio(measured, goal.subject, goal.reference, goal.metric)
        met = None if found.value is None else goal.is_met_by(found.value)
        one = found.comparison
        is_certain = (
            one is not None
            and one.low is not None
            and one.high is not None
            and not one.low <= goal.limit <= one.high
        )
        outcomes.append(Outcome(goal, found, met, is_certain))
    return outcomes

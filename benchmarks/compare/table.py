"""Measurements as Markdown, as JSON, and in benchmarks/README.md. Only write_readme() writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kecho.bench.amounts import duration_text

from . import cap
from .measure import Measured, Run
from .summary import Figure, Outcome, Ratio, figure, goals, ratio
from .workloads import METRICS, Scenario

__all__ = ["BEGIN", "END", "SCHEMA", "markdown", "replace_between", "summary", "to_dict"]

SCHEMA = "kecho.compare/1"
# In a verdict's reasons: what is measured, and what follows from it.
_AMOUNT = re.compile(
    r"(?<![p\d.,])\d[\d.,]*(?= ?(?:%|ms\b|errors\b|outstanding|of \d))| \(ListenOverflows[^)]*\)"
)
_EXPLANATION = re.compile(r": (?:the client is part|its own queueing|raise the server).*|; try .*")
BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"


# ---- text ---------------------------------------------------------------------------------------


def value_text(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if metric == "rate" else duration_text(value)


def figure_text(metric: str, one: Figure) -> str:
    """What is no basis of a ratio is shown, but not without a word."""
    shown = value_text(metric, one.mean)
    if one.mean is None or one.valid == one.runs:
        return shown
    return f"{shown} ({one.valid} of {one.runs} runs)" if one.is_valid else f"{shown} (invalid)"


def ratio_text(found: Ratio) -> str:
    one = found.comparison
    if one is None:
        # The whole reason is below the table, and in the JSON.
        return found.in_short or found.why_not or "-"
    if one.ratio is None:
        return "-"
    if one.low is None or one.high is None:
        return f"{one.ratio:.2f}"
    return f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f})"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(one.replace("|", "\\|") for one in cells) + " |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


# ---- everything ---------------------------------------------------------------------------------


def markdown(every: Sequence[Measured], about: Mapping[str, Any]) -> str:
    """The summary, then each workload with all its contestants, what was set aside and who is
    absent."""
    parts = ["# kecho beside others", "", *_where(about), "", summary(every)]
    for measured in every:
        parts += ["", f"## {measured.title}", ""]
        parts += _contestants(measured)
        parts += _goals(measured)
        parts += [f"- absent: {name}: {why}" for name, why in measured.absent.items()]
        parts += _said(measured)
    return "\n".join(parts) + "\n"


def _where(about: Mapping[str, Any]) -> list[str]:
    environment = about["environment"]
    return [
        f"{about['date']}, Linux {environment['kernel']}, {environment['machine']}, "
        f"{environment['cpu']}, {environment['usable_cpus']} CPUs, kecho {environment['kecho']}, "
        f"Python {environment['python']}. {about['rounds']} interleaved rounds of "
        f"{about['seconds']:g} s, more of those who had fewer than four valid runs; ratios with "
        "95 % intervals. `invalid`: the runs' own checks found that the figure is not what it "
        "seems."
    ]


def _contestants(measured: Measured) -> list[str]:
    scenario = measured.scenario
    head = ["", *(METRICS[one][0] for one in scenario.metrics)]
    head += [f"{METRICS[one][0]}, ratio to {scenario.reference}" for one in scenario.metrics[:2]]
    rows = []
    for name in scenario.contestants:
        if name in measured.absent or not measured.of(name):
            continue
        cells = [name]
        for metric in scenario.metrics:
            one = figure(measured, name, metric)
            cells.append(figure_text(metric, one))
        for metric in scenario.metrics[:2]:
            is_reference = name == scenario.reference
            found = Ratio(None, "1") if is_reference else ratio(
                measured, name, scenario.reference, metric
            )  # fmt: skip
            cells.append(ratio_text(found))
        rows.append(cells)
    return _table(head, rows)


def _goals(measured: Measured) -> list[str]:
    lines = []
    for one in goals(measured):
        goal = one.goal
        sign = ">=" if METRICS[goal.metric][1] else "<="
        lines.append(
            f"- goal: {METRICS[goal.metric][0]} of {goal.subject} {sign} {goal.limit:.2f} x "
            f"{goal.reference}'s: {ratio_text(one.ratio)}: **{one.text}**"
        )
    return ["", *lines] if lines else [""]


def _said(measured: Measured) -> list[str]:
    """What the verdicts said, also where it is not about the figure: nothing is passed over."""
    lines = []
    for name in measured.scenario.contestants:
        runs = measured.of(name)
        said: dict[str, int] = {}
        for run in runs:
            aside = {one.reason: one.why for one in run.set_aside}
            for reason in [run.failure] if run.failure else _reasons(run):
                assert reason is not None
                kind = _without_figures(reason)
                if reason in aside:
                    kind += f" (set aside: {_without_figures(aside[reason])})"
                said[kind] = said.get(kind, 0) + 1
        lines += [f"- {name}, {n} of {len(runs)} runs: {kind}" for kind, n in said.items()]
    return lines


def _reasons(run: Run) -> Sequence[str]:
    return run.result.verdict.reasons if run.result else ()


def _without_figures(reason: str) -> str:
    """Runs differ in the figures of what is the same reason. And of a long one, the first half."""
    return _EXPLANATION.sub("", _AMOUNT.sub("…", reason))


# ---- the summary --------------------------------------------------------------------------------


def summary(every: Sequence[Measured]) -> str:
    """For benchmarks/README.md: latency goals, throughput beside each peer, bursts."""
    lines = [*_latency_rows(every), *_throughput_rows(every), *_burst_rows(every)]
    return "\n".join(lines).strip()


def _latency_rows(every: Sequence[Measured]) -> list[str]:
    rows = []
    for measured in every:
        if "rate" in measured.scenario.metrics[:1]:
            continue
        for one in goals(measured):
            goal = one.goal
            rows.append(
                [
                    measured.title,
                    f"{goal.subject} / {goal.reference}",
                    *(
                        figure_text(goal.metric, figure(measured, name, goal.metric))
                        for name in (goal.subject, goal.reference)
                    ),
                    ratio_text(one.ratio),
                    f"{goal.metric} ≤ {goal.limit:.2f}: {one.text}",
                ]
            )
    if not rows:
        return []
    return [*_table(["latency", "", "first", "second", "ratio", "goal"], rows), ""]


def _throughput_rows(every: Sequence[Measured]) -> list[str]:
    measured_rates = [one for one in every if one.scenario.metrics[0] == "rate"]
    pairs = dict.fromkeys(
        (goal.subject, goal.reference) for one in measured_rates for goal in one.scenario.goals
    )
    if not pairs:
        return []
    rows = []
    for measured in measured_rates:
        outcomes = {
            (one.goal.subject, one.goal.reference, one.goal.metric): one for one in goals(measured)
        }
        rows += [
            [
                f"{measured.title}: {METRICS[metric][0]}",
                figure_text(metric, figure(measured, "kecho", metric)),
                *(_short(outcomes.get((*pair, metric))) for pair in pairs),
            ]
            for metric in ("rate", "cpu")
        ]
    head = ["throughput (goal: rate ≥ 1, CPU ≤ 1)", "kecho"]
    head += [f"{subject} / {reference}" for subject, reference in pairs]
    return [*_table(head, rows), ""]


def _short(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    mark = {True: "", False: " ✗", None: ""}[outcome.met]
    return f"{ratio_text(outcome.ratio)}{mark}"


def _burst_rows(every: Sequence[Measured]) -> list[str]:
    lines = []
    for measured in every:
        scenario = measured.scenario
        if not scenario.is_burst:
            continue
        rows = []
        for name in scenario.contestants:
            if name in measured.absent or not measured.of(name):
                continue
            figures = [figure(measured, name, metric) for metric in ("mean", "p50", "max")]
            rows.append(
                [
                    f"{measured.title}: {name}",
                    *(
                        figure_text(metric, one)
                        for metric, one in zip(("mean", "p50", "max"), figures, strict=True)
                    ),
                    "1" if name == scenario.reference else ratio_text(
                        ratio(measured, name, scenario.reference, "mean")
                    ),
                ]
            )  # fmt: skip
        head = ["burst", "mean", "p50", "max", f"mean, ratio to {scenario.reference}"]
        lines += [*_table(head, rows), ""]
    return lines


# ---- JSON ---------------------------------------------------------------------------------------


def to_dict(every: Sequence[Measured], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured: schema kecho.compare/1, results in kecho.bench's own."""
    return {"schema": SCHEMA, **about, "workloads": [_measured_to_dict(one) for one in every]}


def _measured_to_dict(measured: Measured) -> dict[str, Any]:
    scenario = measured.scenario
    return {
        "name": scenario.name,
        "title": scenario.title,
        "server_cpus_share": cap.SHARE if measured.is_capped else None,
        "reference": scenario.reference,
        "backlog": scenario.backlog,
        "interrupted": measured.interrupted,
        "commands": measured.commands,
        "absent": measured.absent,
        "runs": [_run_to_dict(run, scenario) for run in measured.runs],
        "ratios": [
            _ratio_to_dict(name, metric, ratio(measured, name, scenario.reference, metric))
            for name in scenario.contestants
            if name != scenario.reference
            for metric in scenario.metrics
        ],
        "goals": [
            {
                **_ratio_to_dict(one.goal.subject, one.goal.metric, one.ratio),
                "reference": one.goal.reference,
                "limit": one.goal.limit,
                "met": one.met,
                "certain": one.is_certain,
            }
            for one in goals(measured)
        ],
    }


def _run_to_dict(run: Run, scenario: Scenario) -> dict[str, Any]:
    return {
        "contestant": run.contestant,
        "round": run.round,
        "turn": run.turn,
        "failure": run.failure,
        "server_cpu_ns": run.server_ns,
        "kernel_threads_cpu_ns": run.kernel_ns,
        "server_cpu_echoes": run.echoes,
        "set_aside": [{"reason": one.reason, "why": one.why} for one in run.set_aside],
        "invalid": {
            metric: why for metric in scenario.metrics if (why := run.invalid_because(metric))
        },
        "result": run.result.to_dict() if run.result else None,
    }


def _ratio_to_dict(subject: str, metric: str, found: Ratio) -> dict[str, Any]:
    one = found.comparison
    return {
        "subject": subject,
        "metric": metric,
        "ratio": found.value,
        "interval": [one.low, one.high] if one is not None and one.low is not None else None,
        "why_not": found.why_not,
    }


# ---- README -------------------------------------------------------------------------------------


def replace_between(text: str, made: str) -> str:
    """text with `made` between its two markers. ValueError without them, each once and in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the markers {BEGIN} and {END} are not there, once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{made.strip()}\n{END}{rest.partition(END)[2]}"


def write_readme(path: Path, every: Sequence[Measured], about: Mapping[str, Any]) -> None:
    made = "\n".join([*_where(about), "", summary(every)])
    path.write_text(replace_between(path.read_text(), made))

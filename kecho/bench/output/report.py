"""Results as text: a table for a terminal, lines for other tools. Pure functions of Results."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from ...command import plural
from ...printable import one_line
from ..amounts import duration_text, rate_text, size_text
from ..results.hlog import write_hlog
from ..results.result import Result

__all__ = ["PERCENTILES", "text", "to_csv", "to_hgrm", "to_hlog", "to_txt"]

PERCENTILES: tuple[float, ...] = (50, 90, 99, 99.9, 99.99)
_LATENCY_NAMES = {
    "response": "response (due to done)",
    "service": "service (sent to done)",
    "connect": "connect",
    "first_echo": "first echo (sent to done)",
    "lateness": "lateness (due to sent)",
}
_RESPONSE_NAMES = {
    "burst": "response (from the instant)",
    "connect": "response (connect to done)",
}


def text(result: Result, percentiles: Sequence[float] = PERCENTILES) -> str:
    """Return the table. ~ marks a percentile with too few samples beyond it."""
    workload = result.workload
    lines = [_headline(workload, result.observed.get("address"))]
    lines.append(_outcome(result))
    if workload.get("udp"):
        lines.append(_loss(result))
    if result.latency:
        lines += ["", *_latency_table(result, percentiles)]
    lines += ["", *_errors(result)]
    if len(result.repeats) > 1:
        rates = ", ".join(rate_text(one.rate_per_s) for one in result.repeats)
        lines.append(f"repeats     {rates} echoes/s")
    lines += _verdict(result)
    return "\n".join(map(one_line, lines)) + "\n"


def _headline(workload: Any, address: object) -> str:
    if workload["uds"]:
        where = f"unix {workload['uds']}"
    else:
        host = f"[{workload['host']}]" if ":" in workload["host"] else workload["host"]
        where = f"{'udp' if workload.get('udp') else 'tcp'} {host}:{workload['port']}"
        if isinstance(address, str) and address != where:  # the name was resolved
            where += f" at {address.partition(' ')[2]}"
    parts = [
        plural(workload["connections"], "connection"),
        f"{workload['length']:,} B",
    ]
    if workload["mode"] == "burst":
        parts.append(plural(workload["rounds"], "round"))
    else:
        parts.append(f"{workload['duration']:g} s")
    if workload["rate"]:
        parts.append(f"{rate_text(workload['rate'])} messages/s")
    if (workload["depth"] or 1) > 1:
        parts.append(f"depth {workload['depth']}")
    parts.append(plural(workload["threads"], "thread"))
    if workload["processes"] > 1:
        parts.append(f"{workload['processes']} processes")
    if workload.get("line"):
        parts.append("lines")
    if workload["spin"]:
        parts.append("spinning")
    if not workload["verify"]:
        parts.append("replies not verified")
    return f"{workload['mode']}: {where}, " + ", ".join(parts)


def _outcome(result: Result) -> str:
    partial = " (partial)" if result.partial else ""
    if result.workload["mode"] == "idle":
        lost = result.observed.get("lost") or 0
        held = plural(result.connections, "connection")
        opened_s = result.observed.get("open_s") or 0
        return (
            f"held        {held} for {result.duration_s:.1f} s, opened in {opened_s:.2f} s; "
            f"{lost:,} lost{partial}"
        )
    return (
        f"echoes      {result.echoes:,} in {result.duration_s:.3f} s: "
        f"{rate_text(result.rate_per_s)}/s, {size_text(result.bytes_per_s)}/s each way{partial}"
    )


def _loss(result: Result) -> str:
    lost, late, twice, overtaken = (
        result.observed.get(name) or 0 for name in ("lost", "late", "duplicates", "reordered")
    )
    share = lost / (lost + result.echoes) if lost else 0.0
    return (
        f"lost        {plural(lost, 'datagram')} ({share:.3%}); "
        f"{plural(late, 'reply', 'replies')} late, {twice:,} twice, {overtaken:,} out of order"
    )


def _latency_table(result: Result, percentiles: Sequence[float]) -> list[str]:
    heads = ["", "mean", *(f"p{percent:g}" for percent in percentiles), "max", "samples"]
    rows = [heads]
    for name, histogram in sorted(
        result.latency.items(), key=lambda item: list(_LATENCY_NAMES).index(item[0])
    ):
        title = _LATENCY_NAMES[name]
        if name == "response":
            title = _RESPONSE_NAMES.get(result.workload["mode"], title)
        cells = [title, duration_text(histogram.mean)]
        for percent in percentiles:
            mark = "" if histogram.is_reliable(percent) else "~"
            cells.append(mark + duration_text(histogram.percentile(percent)))
        rows.append([*cells, duration_text(histogram.max), f"{histogram.count:,}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def _errors(result: Result) -> list[str]:
    shown = ", ".join(f"{count:,} {kind}" for kind, count in result.errors.items()) or "none"
    lines = [f"errors      {shown}"]
    if result.first_error:
        lines.append(f"first error {result.first_error}")
    return lines


def _verdict(result: Result) -> list[str]:
    lines = ["verdict     valid" if result.verdict.valid else "verdict     NOT VALID"]
    lines += [f"  because   {reason}" for reason in result.verdict.reasons]
    lines += [f"  note      {note}" for note in result.verdict.notes]
    return lines


def to_csv(results: Sequence[Result], percentiles: Sequence[float] = PERCENTILES) -> str:
    """Return CSV with a line for each latency of each result; without any, one line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    figures = ["count", "mean", "stddev", "min", *(f"p{p:g}" for p in percentiles), "max"]
    writer.writerow(
        [
            *("mode", "connections", "length", "rate_wanted_per_s", "duration_s", "echoes"),
            *("rate_per_s", "bytes_per_s", "errors", "partial", "valid", "latency"),
            *(f"{name}_ns" if name != "count" else name for name in figures),
        ]
    )
    for result in results:
        workload = result.workload
        start = [
            *(workload["mode"], workload["connections"], workload["length"], workload["rate"]),
            *(result.duration_s, result.echoes, result.rate_per_s, result.bytes_per_s),
            *(result.error_count, result.partial, result.verdict.valid),
        ]
        if not result.latency:
            writer.writerow([*start, *([""] * (1 + len(figures)))])
        for name, histogram in result.latency.items():
            values = [
                *(histogram.count, histogram.mean, histogram.stddev, histogram.min),
                *(histogram.percentile(percent) for percent in percentiles),
                histogram.max,
            ]
            writer.writerow([*start, name, *values])
    return out.getvalue()


def to_hgrm(result: Result) -> str:
    """Return the percentile distribution of the mode's main latency.

    Raises ValueError if it has none.
    """
    if result.main_latency is None:
        raise ValueError(f"mode {result.workload['mode']} has no latency")
    return result.latency[result.main_latency].to_hgrm()


def to_hlog(results: Sequence[Result]) -> str:
    """Return an HdrHistogram log with an interval for each latency of each result.

    The name of the latency is its tag.
    """
    started_at = min(result.started_at for result in results)
    return write_hlog(
        (
            (name, result.started_at - started_at, result.duration_s, histogram)
            for result in results
            for name, histogram in result.latency.items()
        ),
        started_at,
    )


def to_txt(result: Result) -> str:
    """Return connection numbers and mean response times over the rounds in µs, a line each.

    A connection that never got an echo has no line. Raises ValueError for modes other than burst.
    """
    if not result.rounds:
        raise ValueError(f"mode {result.workload['mode']} has no times by connection")
    lines = []
    for number, times in enumerate(zip(*(one.response_ns for one in result.rounds), strict=True)):
        answered = [ns for ns in times if ns]
        if answered:
            lines.append(f"{number} {sum(answered) / len(answered) / 1000:.3f}")
    return "\n".join(lines) + "\n"

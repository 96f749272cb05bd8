"""The result of a finished run, made of its counters, histograms and observations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import environment, preflight
from .crew import Report
from .results.histogram import Histogram
from .results.result import Result
from .results.rounds import Round
from .results.series import Interval
from .results.verdict import judge
from .target import Target
from .witness import Observation
from .workload import Workload

__all__ = ["Course", "result_of"]

_COUNTS_OBSERVED = ("late", "duplicates", "reordered", "reconnects", "owed_half", "owed")


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a run went, as its runner knows it.

    started_at: seconds since the epoch.
    duration_s: the measured time.
    open_s: how long it took to open the connections.
    ports: how many connections the ports allow at once; 0: any number.
    ports_freed: how many ports of closed connections are free again.
    time_wait_cleared: how many sockets in TIME_WAIT the run has dropped.
    interrupted: a signal has ended the run.
    ended: how client processes have ended before their time, a line each.
    """

    started_at: float
    duration_s: float
    open_s: float
    ports: int
    ports_freed: int
    time_wait_cleared: int
    interrupted: bool
    ended: Sequence[str]
    series: tuple[Interval, ...]
    rounds: tuple[Round, ...]


def result_of(
    workload: Workload, target: Target, report: Report, course: Course, observation: Observation
) -> Result:
    """Judge a run and return its result."""
    errors: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for one in report.threads:
        errors.update(one["errors"])
        totals.update({name: value for name, value in one.items() if name != "errors"})
    latency = {name: Histogram(counts) for name, counts in report.histograms.items()}
    verdict = judge(
        workload,
        duration_s=course.duration_s,
        echoes=totals["echoes"],
        errors=errors,
        latency=latency,
        threads=report.threads,
        observation=observation,
        ports=course.ports,
        opened=totals["opened"] - course.ports_freed,
        port_hold_s=preflight.port_hold_s(is_loopback=target.is_loopback),
        server_is_local=target.is_local,
    )
    # Clients that come back before their time have lost every connection.
    is_short = workload.mode != "burst" and course.duration_s < 0.999 * workload.duration
    is_partial = course.interrupted or bool(course.ended) or is_short
    if is_partial:
        early = "the run ended before its time"
        verdict = replace(verdict, reasons=(early, *course.ended, *verdict.reasons))
    return Result(
        workload=workload.to_dict(),
        environment=environment.describe(),
        started_at=course.started_at,
        duration_s=course.duration_s,
        connections=totals["opened"],
        echoes=totals["echoes"],
        bytes_sent=totals["bytes_sent"],
        bytes_received=totals["bytes_received"],
        errors=dict(errors),
        first_error=_describe_error(report.first_errors, workload),
        partial=is_partial,
        verdict=verdict,
        latency=latency,
        series=course.series,
        rounds=course.rounds,
        observed={
            "address": target.name,
            "client_cpu_s": round(observation.client_cpu_s, 3),
            "server_cpu_s": observation.server_cpu_s and round(observation.server_cpu_s, 3),
            "others_cpu_share": observation.others_share and round(observation.others_share, 4),
            "stolen_cpu_share": round(observation.stolen_share, 4),
            "syn_events": observation.syn_events,
            "client_rss_bytes": report.rss_bytes,
            "unanswered": totals["unanswered"],
            "open_s": round(course.open_s, 6),
            "lost": _lost(workload, totals),
            **{name: totals[name] for name in _COUNTS_OBSERVED},
            "time_wait_cleared": course.time_wait_cleared,
            "interrupted": course.interrupted,
        },
    )


def _lost(workload: Workload, totals: Mapping[str, int]) -> int | None:
    """Return how many connections (mode idle) or datagrams (UDP) were lost; otherwise None."""
    if workload.mode == "idle":
        return totals["opened"] - totals["open_now"]
    return totals["lost"] if workload.udp else None


def _describe_error(found: list[dict[str, Any]], workload: Workload) -> str | None:
    """Return the earliest error, in one line."""
    if not found:
        return None
    first = min(found, key=lambda one: int(one["at_ns"]))
    text = f"{first['kind']}: connection {first['connection']}"
    if "expected" in first:
        text += (
            f", message {first['sequence']}, byte {first['offset']} of {workload.length}: "
            f"0x{first['found']:02x} came instead of 0x{first['expected']:02x}"
        )
    elif first["kind"] in ("short", "timeout", "closed", "reset", "extra"):
        text += (
            f", message {first['sequence']}, after {first['offset']} of {workload.length} bytes "
            "of the reply"
        )
    if first["errno"]:
        text += f" ({os.strerror(first['errno'])})"
    return text

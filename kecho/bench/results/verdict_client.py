"""How the client is judged: whether it is part of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..workload import Workload
from .findings import NEEDS_LONG_S, SATURATED, Findings
from .histogram import Histogram

__all__ = ["LATE_MOST", "judge_absence", "judge_lateness", "judge_threads", "late_share"]

_QUEUED_MOST = 0.25  # of the time, a thread that waits for a CPU
_LATE_LEAST_NS = 500_000  # a timer may wake the client so late
LATE_MOST = 0.5  # of a response time, the client's own part
_BURST_LATE_MOST = 0.9  # of a response time; in a burst, calling connect takes a part of it
_AWAY_MOST = 0.02  # of the run, at one go
_AWAY_LEAST_S = 0.05
_PERCENTILES = (50, 90, 99, 99.9, 99.99)


def judge_threads(
    workload: Workload, threads: Sequence[Mapping[str, Any]], findings: Findings
) -> None:
    """Check that the client's threads had CPU time to spare."""
    busiest = queued = never_idle = 0.0
    for one in threads:
        running_ns = one["running_ns"]
        if running_ns < NEEDS_LONG_S * 1e9:
            continue
        busy_ns = running_ns - one["waited_ns"] if workload.spin else one["cpu_ns"]
        busiest = max(busiest, busy_ns / running_ns)
        queued = max(queued, one["queued_ns"] / running_ns)
        never_idle = max(never_idle, (one["cpu_ns"] + one["queued_ns"]) / running_ns)
    # A stream measures what client and server reach together.
    is_reason = workload.mode != "stream"
    if busiest >= SATURATED:
        findings.add(
            f"a client thread was busy {busiest:.0%} of the time: the client is part of what was "
            "measured; give it more --threads or CPUs",
            is_reason=is_reason,
        )
    elif queued > _QUEUED_MOST or (never_idle >= SATURATED and not workload.spin):
        # In a burst all threads are busy at once: judge_lateness() says what that costs.
        findings.add(
            f"a client thread was ready to run and had no CPU {queued:.0%} of the time: the "
            "figures contain that wait; try fewer --threads, CPUs apart from the server's "
            "(taskset), or another host",
            is_reason=is_reason and workload.mode != "burst",
        )


def late_share(latency: Mapping[str, Histogram]) -> tuple[float, float, int, int] | None:
    """Return the reliable percentile of which the client's lateness is the largest share.

    That is the share, the percentile, and lateness and response time there in ns. None if one of
    the two was not measured, or the lateness is nowhere worth mentioning.
    """
    late, response = latency.get("lateness"), latency.get("response")
    if not late or not response:
        return None
    shares = []
    for percent in filter(response.is_reliable, _PERCENTILES):
        late_ns, response_ns = late.percentile(percent), response.percentile(percent)
        if late_ns >= _LATE_LEAST_NS:
            shares.append((late_ns / max(response_ns, 1), percent, late_ns, response_ns))
    return max(shares, default=None)


def judge_lateness(
    workload: Workload, latency: Mapping[str, Histogram], findings: Findings
) -> None:
    """Check that the client sent, or connected, when it was due."""
    late, response = latency.get("lateness"), latency.get("response")
    if not late:
        return
    worst = late_share(latency)
    if workload.mode == "open" and worst is not None and worst[0] > LATE_MOST:
        _, percent, late_ns, response_ns = worst
        findings.reason(
            f"sends were late: at p{percent:g} by {late_ns / 1e6:.1f} ms of a response time of "
            f"{response_ns / 1e6:.1f} ms; that is the client's fault, not the server's"
        )
    if workload.mode != "burst":
        return
    if response:
        # Not at a higher percentile, where one slow round of ten would decide.
        late_ns, response_ns = late.percentile(90), response.percentile(90)
        if late_ns >= max(_LATE_LEAST_NS, _BURST_LATE_MOST * response_ns):
            findings.reason(
                f"the client needed {late_ns / 1e6:.1f} of {response_ns / 1e6:.1f} ms (p90) to "
                "call connect: it measured itself; use fewer connections, or more CPUs and "
                "--threads"
            )
            return
    findings.note(
        f"the client needed {late.max / 1e6:.1f} ms to call connect on all connections; response "
        "times count from the start of the burst"
    )


def judge_absence(
    workload: Workload,
    duration_s: float,
    threads: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Histogram],
    findings: Findings,
) -> None:
    """Check that each client thread looked at its sockets often enough.

    A thread that was stopped, or busy, reads a reply later than it came.
    """
    away_ns = max((one["away_ns"] for one in threads), default=0)
    text = f"a client thread did not look at its sockets for {away_ns / 1e6:.1f} ms"
    if workload.mode != "burst" and away_ns > 1e9 * max(_AWAY_LEAST_S, _AWAY_MOST * duration_s):
        findings.reason(f"{text}: it was stopped, or had no CPU")
        return
    times = latency.get("response") or latency.get("service")
    if not times or workload.mode in ("stream", "idle"):
        return
    # It delays every outstanding message of the thread once. Are those enough for a percentile?
    outstanding = workload.total_connections / workload.total_threads
    if workload.mode == "closed":
        outstanding *= workload.deepest
    for percent in reversed(_PERCENTILES) if workload.mode in ("closed", "connect") else ():
        is_reached = outstanding >= times.count * (100 - percent) / 100
        if times.is_reliable(percent) and is_reached and away_ns > times.percentile(percent) / 2:
            findings.reason(f"{text}: at least half of p{percent:g} is due to that")
            return
    if away_ns > times.max / 2:
        findings.note(f"{text}: the longest time is due to that")

"""What a verdict's reasons mean for one figure: nothing is taken back, but not every reason is
about every figure. Pure functions.

- A client that is busy, waits or looks late spoils times and rates. The server's CPU time per echo
  is the server's own all the same; the reasons are told beside it.
- "at least half of p99.99 is due to that" says nothing of p50, unless the thread's outstanding
  messages reach down to that.
- Where kernel threads echo, their CPU time is the server's and not that "of others", and the client
  waits for its CPU while they have it. The same holds for a server that shares the client's CPUs by
  intention. Both are set aside only as far as the CPU time measured explains them.
- A burst larger than the backlog is there to overflow it: its full queue is what is measured. In a
  closed loop, connects that met one were over when the measurement began.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kecho.bench import Result
from kecho.bench.results.compare import REPEATS_LEAST

__all__ = ["Explained", "are_enough", "explained", "in_short", "invalid_because"]

ESCAPES_CAP = "kernel threads echo, which no quota holds"
_CLIENTS_OWN = (
    "a client thread ",
    "sends were late",
    "throughput x mean service time",
)
_IS_ITS_OWN = re.compile(r"at least half of p([0-9.]+) is due to that")
_TOO_FEW = re.compile(r"samples? (?:are|is) too few for p([0-9.]+)")
_OTHERS = re.compile(r"other processes took (\d+)% of the CPU time")
_NO_CPU = re.compile(r"a client thread was ready to run and had no CPU (\d+)% of the time")
_FULL_QUEUE = "connects met a full queue"
_OPENED_BEFORE = ("closed", "stream")  # modes that connect once
_OTHERS_MOST = 0.10  # what the verdict allows, of all CPUs
_QUEUED_BEYOND = 0.05  # of the time, that the client may wait for more than the server


@dataclass(frozen=True)
class Explained:
    """A reason that was set aside, and what explains it."""

    reason: str
    why: str


def are_enough(valid: int, runs: int) -> bool:
    """So many valid ones of all runs are to be compared: four of them, or all when there are
    fewer."""
    return valid >= min(runs, REPEATS_LEAST) > 0


def invalid_because(metric: str, result: Result, set_aside: tuple[Explained, ...]) -> list[str]:
    """The reasons of the verdict that spoil this figure; none: it may be compared."""
    aside = {one.reason for one in set_aside}
    return [
        reason
        for reason in result.verdict.reasons
        if reason not in aside and _spoils(reason, metric, result)
    ]


def _spoils(reason: str, metric: str, result: Result) -> bool:
    percent = float(metric[1:]) if metric[0] == "p" else None
    if found := _IS_ITS_OWN.search(reason):
        return percent is not None and _reaches(float(found[1]), percent, result)
    if found := _TOO_FEW.search(reason):
        return metric == "max" or (percent is not None and percent >= float(found[1]))
    if metric == "cpu":
        return not reason.startswith(_CLIENTS_OWN)
    return True


def _reaches(named: float, percent: float, result: Result) -> bool:
    """The verdict names the highest percentile that the client's absence reaches; it may reach a
    lower one if as many messages as were outstanding lie beyond that."""
    if percent >= named:
        return True
    workload = result.workload
    outstanding = workload["connections"] / workload["threads"] * (workload["depth"] or 1)
    echoes = result.latency[result.main_latency].count if result.main_latency else 0
    return outstanding >= echoes * (100 - percent) / 100


def explained(
    result: Result,
    *,
    seconds: float,
    cpus: int,
    server_ns: int,
    kernel_ns: int | None,
    client_cpus: int,
    shares_cpus: bool,
    overflows: bool = False,
) -> tuple[Explained, ...]:
    """What server_ns of CPU time within `seconds` explains; of that kernel_ns was kernel threads',
    None if they do not echo. client_cpus: how many the client's threads are on. overflows: the
    server's backlog is too short by intention."""
    found = []
    kernel_share = (kernel_ns or 0) / 1e9 / seconds if seconds > 0 else 0.0
    server_share = server_ns / 1e9 / seconds if seconds > 0 else 0.0
    beside_share = (server_share if shares_cpus else kernel_share) / client_cpus
    for reason in result.verdict.reasons:
        if (taken := _OTHERS.match(reason)) and kernel_ns is not None:
            others = int(taken[1]) / 100 - kernel_share / cpus
            if others <= _OTHERS_MOST:
                found.append(Explained(reason, _kernel_text(kernel_share)))
        elif (waited := _NO_CPU.match(reason)) and (kernel_ns is not None or shares_cpus):
            if int(waited[1]) / 100 <= beside_share + _QUEUED_BEYOND:
                why = (
                    f"the server, on the client's own CPUs by intention, ran {beside_share:.0%} of "
                    "the time"
                    if shares_cpus
                    else _kernel_text(kernel_share)
                )
                found.append(Explained(reason, why))
        elif overflows and reason.startswith(_FULL_QUEUE):
            found.append(Explained(reason, "the backlog is shorter than the burst by intention"))
        elif reason.startswith(_FULL_QUEUE) and result.workload["mode"] in _OPENED_BEFORE:
            found.append(Explained(reason, "that was before the measurement began"))
    return tuple(found)


_IN_SHORT = (
    ("other processes took", "others took CPU"),
    ("the hypervisor took", "the hypervisor took CPU"),
    ("a client thread was ready to run and had no CPU", "the client waited for a CPU"),
    ("a client thread was busy", "the client was busy"),
    ("a client thread did not look at its sockets", "the client was away"),
    ("the client needed", "the client was late to connect"),
    ("throughput x mean service time", "Little's law"),
    (_FULL_QUEUE, "full accept queue"),
    ("the run ended before its time", "interrupted"),
    (ESCAPES_CAP, "not held to half a CPU"),
)


def in_short(reason: str) -> str:
    """For a table's cell; the whole of it stands elsewhere."""
    return next((short for begin, short in _IN_SHORT if reason.startswith(begin)), reason)


def _kernel_text(share: float) -> str:
    return f"kernel threads, which echo, ran {share:.0%} of the time"

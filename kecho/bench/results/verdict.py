"""The verdict: whether a run measured the server, or something else.

judge() is a pure function of what was observed. verdict_client.py judges the client,
verdict_machine.py the machine, the server and the network stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...command import plural
from ..amounts import rate_text
from ..tuning.limits import TIME_WAIT_S
from ..witness import Observation
from ..workload import Workload
from .findings import Findings
from .histogram import BEYOND, Histogram
from .pace import is_achieved, is_kept_up
from .result import Verdict
from .verdict_client import judge_absence, judge_lateness, judge_threads
from .verdict_machine import judge_machine, judge_ports, judge_quotas, judge_server

__all__ = ["judge"]

_LITTLE_TOLERANCE = 0.10
_BEYOND_MOST = 0.05  # of the time that messages took
_PERCENTILES = (90, 99, 99.9, 99.99)


def judge(
    workload: Workload,
    *,
    duration_s: float,
    echoes: int,
    errors: Mapping[str, int],
    latency: Mapping[str, Histogram],
    threads: Sequence[Mapping[str, Any]],
    observation: Observation,
    ports: int,
    opened: int,
    port_hold_s: float = TIME_WAIT_S,
    server_is_local: bool = True,
) -> Verdict:
    """Return the verdict on a run.

    threads: the counters of each client thread.
    ports: how many connections the ports allow within port_hold_s, from all source addresses;
        0: no limit.
    opened: how many connections were opened.
    port_hold_s: how long a closed connection keeps its port from another one.
    """
    findings = Findings()
    if errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in errors.items())
        findings.reason(f"{plural(sum(errors.values()), 'error')}: {kinds}")
    if not echoes and workload.mode != "idle":
        findings.reason("not one reply was measured")
    unanswered = sum(one["unanswered"] for one in threads)
    if unanswered and not errors:
        findings.reason(
            f"{plural(unanswered, 'message was', 'messages were')} not answered before the client "
            "gave up"
        )
    _judge_rate(workload, duration_s, echoes, threads, latency, findings)
    if workload.udp:
        _judge_loss(threads, echoes, findings)
    judge_threads(workload, threads, findings)
    judge_lateness(workload, latency, findings)
    judge_absence(workload, duration_s, threads, latency, findings)
    judge_quotas(workload, observation, findings)
    judge_server(workload, observation, server_is_local, findings)
    judge_machine(observation, findings)
    # While a lost datagram waits for its timeout, nothing is outstanding at the server.
    if not any(one.get("lost") for one in threads):
        _judge_little(workload, duration_s, echoes, threads, latency, findings)
    _judge_samples(workload, latency, findings)
    if ports and workload.close == "fin" and not workload.udp:
        judge_ports(observation.seconds, opened, ports, port_hold_s, findings)
    _judge_endings(threads, findings)
    if not workload.verify:
        findings.note("the bytes of the replies were not compared (--no-verify)")
    return findings.verdict()


def _judge_rate(
    workload: Workload,
    duration_s: float,
    echoes: int,
    threads: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Histogram],
    findings: Findings,
) -> None:
    """Compare the rate that was asked for with what was echoed, and when."""
    if not workload.rate:
        return
    asked = f"{rate_text(workload.rate)} messages/s were asked for"
    owed_half = sum(one["owed_half"] for one in threads)
    owed = sum(one["owed"] for one in threads)
    if not is_achieved(workload.rate, echoes, duration_s):
        achieved = echoes / duration_s if duration_s > 0 else 0.0
        findings.reason(f"{asked}, {rate_text(achieved)} were echoed")
    elif not is_kept_up(workload.rate, duration_s, owed_half, owed, latency.get("response")):
        findings.reason(
            f"{asked}, the server did not keep up: "
            f"{plural(owed, 'message was', 'messages were')} still owed at the end"
        )


def _judge_loss(threads: Sequence[Mapping[str, Any]], echoes: int, findings: Findings) -> None:
    """Say how many datagrams were lost, late, duplicated or reordered."""
    lost = sum(one["lost"] for one in threads)
    if lost:
        findings.reason(
            f"{plural(lost, 'datagram was', 'datagrams were')} lost "
            f"({100 * lost / (lost + echoes):.3g} % of all): the latency is that of the others"
        )
    for name, what in (
        ("late", "came after the timeout"),
        ("duplicates", "came twice"),
        ("reordered", "overtaken by later ones"),
    ):
        if total := sum(one[name] for one in threads):
            findings.note(f"{plural(total, 'reply', 'replies')} {what}")


def _judge_little(
    workload: Workload,
    duration_s: float,
    echoes: int,
    threads: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Histogram],
    findings: Findings,
) -> None:
    """Check a closed loop by Little's law (J. D. C. Little, 1961).

    Throughput x mean service time has to be the number of outstanding messages that the workload
    allows. Messages that the client has in hand, between a reply and the next message, are added;
    waiting outside the measured time is not counted.
    """
    if workload.mode != "closed" or not echoes or duration_s <= 0:
        return
    carried_ns = sum(one["carried_in_ns"] - one["carried_out_ns"] for one in threads)
    outstanding = (echoes * latency["service"].mean + carried_ns) / 1e9 / duration_s
    in_hand = sum(one["between_ns"] for one in threads) / 1e9 / duration_s
    expected = workload.total_connections * workload.deepest
    if (beyond := -carried_ns / 1e9 / duration_s / expected) > _BEYOND_MOST:
        findings.note(
            f"{beyond / (beyond + 1):.0%} of the messages' time lies beyond the end; they count in "
            "full, so the rate may be too high: use a longer --duration, or --warmup"
        )
    if abs(outstanding + in_hand - expected) > _LITTLE_TOLERANCE * expected:
        findings.reason(
            f"throughput x mean service time is {outstanding:.1f} outstanding messages, "
            f"not {expected} (Little's law)"
        )
    elif in_hand > _LITTLE_TOLERANCE * expected:
        findings.note(
            f"the client had {in_hand / expected:.0%} of the messages in hand, between a reply and "
            "the next message: the rate includes that time, the service time does not"
        )


def _judge_samples(
    workload: Workload, latency: Mapping[str, Histogram], findings: Findings
) -> None:
    """Name the percentiles that too few samples lie beyond."""
    times = latency.get("response") or latency.get("service")
    if workload.mode in ("stream", "idle") or not times:
        return
    unreliable = [percent for percent in _PERCENTILES if not times.is_reliable(percent)]
    if not unreliable:
        return
    findings.add(
        f"{plural(times.count, 'sample is', 'samples are')} too few for p{unreliable[0]:g}"
        f"{' and above' if len(unreliable) > 1 else ''}: fewer than {BEYOND} lie beyond it",
        is_reason=unreliable[0] <= 99,
    )


def _judge_endings(threads: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    """Say how many connections the server did not end, or ended too early."""
    if unended := sum(one["unended"] for one in threads):
        findings.note(
            f"{plural(unended, 'connection was', 'connections were')} not ended by the server "
            "after the client's FIN: anything sent later than the reply was not seen"
        )
    if reconnects := sum(one["reconnects"] for one in threads):
        findings.note(
            f"{plural(reconnects, 'connection was', 'connections were')} ended by the server and "
            "opened anew: the times of messages that waited for that include it"
        )

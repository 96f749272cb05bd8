"""Whether a run measured the server, or something else: a pure function of what was observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .histogram import Histogram
from .result import Verdict
from .witness import Observation
from .workload import Workload

__all__ = ["judge"]

_SATURATED = 0.95  # of a CPU
_OTHERS_MOST = 0.10  # of all CPU time
_STOLEN_MOST = 0.02
_LATE_MOST_NS = 1_000_000
_LITTLE_TOLERANCE = 0.10
_BEYOND = 10  # samples that have to lie beyond a percentile for it to mean something
_PORTS_MOST = 0.8
_ACHIEVED_LEAST = 0.98  # of the rate asked for
_NEEDS_LONG_S = 0.2  # clock ticks of 10 ms say nothing about shorter runs


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
) -> Verdict:
    """threads: the counters of each client thread. ports: how many connections may be opened,
    over all source addresses, before TIME_WAIT ends; 0: no limit."""
    reasons: list[str] = []
    notes: list[str] = []
    if errors:
        total = sum(errors.values())
        reasons.append(f"{total} errors: " + ", ".join(f"{n} {kind}" for kind, n in errors.items()))
    if not echoes and workload.mode != "idle":
        reasons.append("not one reply was measured")
    unanswered = sum(one["unanswered"] for one in threads)
    if unanswered and not errors:
        reasons.append(f"{unanswered:,} messages were not answered before the client gave up")
    achieved = echoes / duration_s if duration_s > 0 else 0.0
    if workload.rate and achieved < _ACHIEVED_LEAST * workload.rate:
        reasons.append(
            f"{workload.rate:,.0f} messages/s were asked for, {achieved:,.0f} were echoed"
        )
    if workload.udp:
        _judge_loss(threads, echoes, reasons, notes)
    _judge_client(workload, threads, latency, reasons, notes)
    _judge_server(workload, observation, reasons, notes)
    _judge_machine(observation, reasons)
    _judge_connects(observation, reasons)
    if not any(one.get("lost") for one in threads):  # one that waits for its timeout does no work
        _judge_little(workload, duration_s, echoes, latency, reasons)
    _judge_samples(workload, latency, reasons, notes)
    if ports and workload.close == "fin" and not workload.udp and opened > _PORTS_MOST * ports:
        reasons.append(
            f"{opened:,} connections were opened of {ports:,} that the ports allow in 60 s of "
            "TIME_WAIT: use --source 127.0.0.0/8 or --close rst"
        )
    if not workload.verify:
        notes.append("the bytes of the replies were not compared (--no-verify)")
    return Verdict(tuple(reasons), tuple(notes))


def _judge_loss(
    threads: Sequence[Mapping[str, Any]], echoes: int, reasons: list[str], notes: list[str]
) -> None:
    total = {
        name: sum(one[name] for one in threads)
        for name in ("lost", "late", "duplicates", "reordered")
    }
    if total["lost"]:
        share = total["lost"] / (total["lost"] + echoes)
        reasons.append(
            f"{total['lost']:,} datagrams were lost ({share:.2g} of all): the latency is of the "
            "others"
        )
    others = {
        "late": "came after the timeout",
        "duplicates": "came twice",
        "reordered": "were overtaken by later ones",
    }
    notes += [f"{total[name]:,} replies {what}" for name, what in others.items() if total[name]]


def _judge_client(
    workload: Workload,
    threads: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Histogram],
    reasons: list[str],
    notes: list[str],
) -> None:
    busiest = 0.0
    for one in threads:
        running_ns = one["running_ns"]
        busy_ns = running_ns - one["waited_ns"] if workload.spin else one["cpu_ns"]
        if running_ns >= _NEEDS_LONG_S * 1e9:
            busiest = max(busiest, busy_ns / running_ns)
    if busiest >= _SATURATED:
        text = (
            f"a client thread was busy {busiest:.0%} of the time: the client is part of what was "
            "measured; give it more --threads or CPUs"
        )
        # A stream takes what both ends give; the others claim a figure of the server's.
        (notes if workload.mode == "stream" else reasons).append(text)
    late = latency.get("lateness")
    if not late:
        return
    late_ns = late.percentile(99)
    if workload.mode == "open" and late_ns > _LATE_MOST_NS:
        reasons.append(
            f"sends were late: 1 % of them by {late_ns / 1e6:.1f} ms or more; the response time "
            "counts that, the server is not to blame"
        )
    if workload.mode == "burst":
        notes.append(
            f"the client needed {late.max / 1e6:.1f} ms to call connect everywhere; response "
            "times count from the first instant"
        )


def _judge_server(
    workload: Workload, observation: Observation, reasons: list[str], notes: list[str]
) -> None:
    if observation.server_cpu_s is None or observation.seconds < _NEEDS_LONG_S:
        return
    usable = max(1, min(observation.server_threads, observation.cpus))
    share = observation.server_cpu_s / observation.seconds
    if share < _SATURATED * usable:
        return
    text = f"the server was saturated: {share:.2f} of {usable} CPUs"
    # Without a schedule the server sets the pace: saturated, the figure is its capacity.
    (reasons if workload.mode == "open" else notes).append(text)


def _judge_machine(observation: Observation, reasons: list[str]) -> None:
    if observation.seconds < _NEEDS_LONG_S:
        return
    if observation.others_share is not None and observation.others_share > _OTHERS_MOST:
        reasons.append(f"other processes took {observation.others_share:.0%} of the CPU time")
    if observation.stolen_share > _STOLEN_MOST:
        reasons.append(f"the hypervisor took {observation.stolen_share:.0%} of the CPU time")


def _judge_connects(observation: Observation, reasons: list[str]) -> None:
    events = observation.syn_events
    if events:
        shown = ", ".join(f"{name} {count}" for name, count in events.items())
        reasons.append(
            f"connects met a full queue ({shown}): raise the server's backlog and "
            "net.core.somaxconn"
        )


def _judge_little(
    workload: Workload,
    duration_s: float,
    echoes: int,
    latency: Mapping[str, Histogram],
    reasons: list[str],
) -> None:
    """In a closed loop, as many messages are outstanding as are allowed: throughput x mean service
    time has to say so (J. D. C. Little, 1961)."""
    if workload.mode != "closed" or not echoes or duration_s <= 0:
        return
    outstanding = echoes / duration_s * latency["service"].mean / 1e9
    expected = workload.total_connections * workload.deepest
    if abs(outstanding - expected) > _LITTLE_TOLERANCE * expected:
        reasons.append(
            f"throughput x mean service time is {outstanding:.1f} outstanding messages, "
            f"not {expected} (Little's law)"
        )


def _judge_samples(
    workload: Workload,
    latency: Mapping[str, Histogram],
    reasons: list[str],
    notes: list[str],
) -> None:
    names = [name for name in ("response", "service") if latency.get(name)]
    if workload.mode in ("stream", "idle") or not names:
        return
    count = latency[names[0]].count
    unfounded = [p for p in (90, 99, 99.9, 99.99) if count * (100 - p) / 100 < _BEYOND - 1e-9]
    if not unfounded:
        return
    text = (
        f"{count:,} samples are too few for p{unfounded[0]:g}"
        f"{' and above' if len(unfounded) > 1 else ''}: fewer than {_BEYOND} lie beyond it"
    )
    (reasons if unfounded[0] <= 99 else notes).append(text)

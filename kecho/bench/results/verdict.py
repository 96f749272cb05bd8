"""Whether a run measured the server, or something else: a pure function of what was observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...command import plural
from ..amounts import rate_text
from ..witness import Observation
from ..workload import Workload
from .histogram import Histogram
from .pace import is_achieved, is_kept_up
from .result import Verdict

__all__ = ["BEYOND", "LATE_MOST", "judge", "late_share"]

_SATURATED = 0.95  # of a CPU
_OTHERS_MOST = 0.10  # of all CPU time
_STOLEN_MOST = 0.02
_QUEUED_MOST = 0.25  # of the time, a thread that waits for a CPU
_LATE_LEAST_NS = 500_000  # a timer's wake-up is no lateness to speak of
LATE_MOST = 0.5  # of a response time, the client's own part
_BURST_LATE_MOST = 0.9  # a burst lasts: its end is late by nature, but not by all of the response
_AWAY_MOST = 0.02  # of the run, at one go
_AWAY_LEAST_S = 0.05
_LITTLE_TOLERANCE = 0.10
_BEYOND_MOST = 0.05  # of the time that messages took
BEYOND = 10  # samples that have to lie beyond a percentile for it to mean something
_PERCENTILES = (50, 90, 99, 99.9, 99.99)
_PORTS_MOST = 0.8
_TIME_WAIT_S = 60.0
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
    port_hold_s: float = _TIME_WAIT_S,
    server_is_local: bool = True,
) -> Verdict:
    """threads: the counters of each client thread. ports: how many connections there may be at
    once, over all source addresses, and of those closed within port_hold_s; 0: no limit."""
    reasons: list[str] = []
    notes: list[str] = []
    if errors:
        total = sum(errors.values())
        reasons.append(
            f"{plural(total, 'error')}: " + ", ".join(f"{n} {kind}" for kind, n in errors.items())
        )
    if not echoes and workload.mode != "idle":
        reasons.append("not one reply was measured")
    unanswered = sum(one["unanswered"] for one in threads)
    if unanswered and not errors:
        reasons.append(
            f"{plural(unanswered, 'message was', 'messages were')} not answered before the client "
            "gave up"
        )
    if workload.rate and not is_achieved(workload.rate, echoes, duration_s):
        achieved = echoes / duration_s if duration_s > 0 else 0.0
        reasons.append(
            f"{rate_text(workload.rate)} messages/s were asked for, {rate_text(achieved)} were "
            "echoed"
        )
    elif workload.rate and not is_kept_up(
        workload.rate,
        duration_s,
        sum(one["owed_half"] for one in threads),
        owed := sum(one["owed"] for one in threads),
        latency.get("response"),
    ):
        reasons.append(
            f"{rate_text(workload.rate)} messages/s were asked for, the server did not keep up: "
            f"{plural(owed, 'message was', 'messages were')} still owed at the end"
        )
    if workload.udp:
        _judge_loss(threads, echoes, reasons, notes)
    _judge_client(workload, threads, reasons, notes)
    _judge_lateness(workload, latency, reasons, notes)
    _judge_absence(workload, duration_s, threads, latency, reasons, notes)
    _judge_quotas(workload, observation, reasons, notes)
    _judge_server(workload, observation, reasons, notes)
    _note_what_is_unknown(observation, server_is_local, notes)
    _judge_machine(observation, reasons)
    _judge_connects(observation, reasons)
    if not any(one.get("lost") for one in threads):  # one that waits for its timeout does no work
        _judge_little(workload, duration_s, echoes, threads, latency, reasons, notes)
    _judge_samples(workload, latency, reasons, notes)
    if ports and workload.close == "fin" and not workload.udp:
        _judge_ports(observation.seconds, opened, ports, port_hold_s, reasons, notes)
    unended = sum(one["unended"] for one in threads)
    if unended:
        notes.append(
            f"{plural(unended, 'connection was', 'connections were')} not ended by the server "
            "after the client had: what it may have sent later than the reply was not seen"
        )
    reconnects = sum(one["reconnects"] for one in threads)
    if reconnects:
        notes.append(
            f"{plural(reconnects, 'connection was', 'connections were')} ended by the server and "
            "opened anew: the time that took is in the times of the messages that waited for it"
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
            f"{plural(total['lost'], 'datagram was', 'datagrams were')} lost ({100 * share:.3g} % "
            "of all): the latency is of the others"
        )
    others = {
        "late": "came after the timeout",
        "duplicates": "came twice",
        "reordered": "overtaken by later ones",
    }
    notes += [
        f"{plural(total[name], 'reply', 'replies')} {what}"
        for name, what in others.items()
        if total[name]
    ]


def _judge_client(
    workload: Workload,
    threads: Sequence[Mapping[str, Any]],
    reasons: list[str],
    notes: list[str],
) -> None:
    busiest = queued = never_idle = 0.0
    for one in threads:
        running_ns = one["running_ns"]
        if running_ns < _NEEDS_LONG_S * 1e9:
            continue
        busy_ns = running_ns - one["waited_ns"] if workload.spin else one["cpu_ns"]
        busiest = max(busiest, busy_ns / running_ns)
        queued = max(queued, one["queued_ns"] / running_ns)
        never_idle = max(never_idle, (one["cpu_ns"] + one["queued_ns"]) / running_ns)
    # A stream takes what both ends give; the others claim a figure of the server's.
    said = notes if workload.mode == "stream" else reasons
    if busiest >= _SATURATED:
        said.append(
            f"a client thread was busy {busiest:.0%} of the time: the client is part of what was "
            "measured; give it more --threads or CPUs"
        )
    elif queued > _QUEUED_MOST or (never_idle >= _SATURATED and not workload.spin):
        # In a burst all have something to do at once: its lateness tells what that has cost.
        (notes if workload.mode == "burst" else said).append(
            f"a client thread had something to do and no CPU {queued:.0%} of the time: its own "
            "queueing is in the figures; try fewer --threads, CPUs apart from the server's "
            "(taskset), or another host"
        )


def _founded(histogram: Histogram) -> list[float]:
    """The percentiles that enough samples lie beyond."""
    return [
        percent
        for percent in _PERCENTILES
        if histogram.count * (100 - percent) / 100 >= BEYOND - 1e-9
    ]


def late_share(latency: Mapping[str, Histogram]) -> tuple[float, float, int, int] | None:
    """The founded percentile of which the client's own lateness is the largest share: the share,
    the percentile, lateness and response there in ns; None without both."""
    late, response = latency.get("lateness"), latency.get("response")
    if not late or not response:
        return None
    shares = []
    for percent in _founded(response):
        late_ns, response_ns = late.percentile(percent), response.percentile(percent)
        if late_ns >= _LATE_LEAST_NS:
            shares.append((late_ns / max(response_ns, 1), percent, late_ns, response_ns))
    return max(shares, default=None)


def _judge_lateness(
    workload: Workload, latency: Mapping[str, Histogram], reasons: list[str], notes: list[str]
) -> None:
    late = latency.get("lateness")
    if not late:
        return
    worst = late_share(latency)
    if workload.mode == "open" and worst is not None and worst[0] > LATE_MOST:
        _, percent, late_ns, response_ns = worst
        reasons.append(
            f"sends were late: at p{percent:g} by {late_ns / 1e6:.1f} ms, where the response time "
            f"is {response_ns / 1e6:.1f} ms and counts that; the server is not to blame"
        )
    if workload.mode != "burst":
        return
    response = latency.get("response")
    if response:
        # Not further up: there it is one slow round of ten that is judged.
        late_ns, response_ns = late.percentile(90), response.percentile(90)
        if late_ns >= max(_LATE_LEAST_NS, _BURST_LATE_MOST * response_ns):
            reasons.append(
                f"the client needed {late_ns / 1e6:.1f} of {response_ns / 1e6:.1f} ms (p90) to "
                "call connect: the response times are its own; fewer connections, or more CPUs "
                "and --threads"
            )
            return
    notes.append(
        f"the client needed {late.max / 1e6:.1f} ms to call connect everywhere; response "
        "times count from the first instant"
    )


def _judge_absence(
    workload: Workload,
    duration_s: float,
    threads: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Histogram],
    reasons: list[str],
    notes: list[str],
) -> None:
    """A client thread that was stopped, or busy, looks at a reply later than it came."""
    away_ns = max((one["away_ns"] for one in threads), default=0)
    text = f"a client thread did not look at its sockets for {away_ns / 1e6:.1f} ms"
    if workload.mode != "burst" and away_ns > 1e9 * max(_AWAY_LEAST_S, _AWAY_MOST * duration_s):
        reasons.append(f"{text}: it was stopped, or had no CPU")
        return
    times = latency.get("response") or latency.get("service")
    if not times or workload.mode in ("stream", "idle"):
        return
    # All that the thread has outstanding is late by it, once: does that reach a percentile?
    outstanding = workload.total_connections / workload.total_threads
    if workload.mode == "closed":
        outstanding *= workload.deepest
    for percent in reversed(_founded(times) if workload.mode in ("closed", "connect") else []):
        is_reached = outstanding >= times.count * (100 - percent) / 100
        if is_reached and away_ns > times.percentile(percent) / 2:
            reasons.append(f"{text}: half of p{percent:g}, or more, is its own")
            return
    if away_ns > times.max / 2:
        notes.append(f"{text}: the longest time is its own")


def _judge_quotas(
    workload: Workload, observation: Observation, reasons: list[str], notes: list[str]
) -> None:
    """A process that has used up its cgroup's CPU quota does not run until the period ends."""
    # As for a saturated server: without a schedule, it sets the pace.
    servers = reasons if workload.mode == "open" else notes
    clients = notes if workload.mode == "stream" else reasons
    for name, throttled, said in (
        ("server", observation.server_throttled, servers),
        ("client", observation.client_throttled, clients),
    ):
        if throttled is not None and throttled[0] > 0:
            said.append(
                f"the {name} was throttled: in {throttled[0]:,} of "
                f"{plural(throttled[1], 'period')} its cgroup had used up its CPU quota"
            )


def _judge_server(
    workload: Workload, observation: Observation, reasons: list[str], notes: list[str]
) -> None:
    if observation.server_cpu_s is None or observation.seconds < _NEEDS_LONG_S:
        return
    usable = max(1, min(observation.server_threads, observation.cpus))
    share = observation.server_cpu_s / observation.seconds
    busiest = observation.server_busiest_s / observation.seconds
    if share >= _SATURATED * usable:
        text = f"the server was saturated: {share:.2f} of {usable} CPUs"
    elif busiest >= _SATURATED:
        text = f"the server was saturated: one of its threads had a CPU {busiest:.0%} of the time"
    else:
        return
    # Without a schedule the server sets the pace: saturated, the figure is its capacity.
    (reasons if workload.mode == "open" else notes).append(text)


def _note_what_is_unknown(
    observation: Observation, server_is_local: bool, notes: list[str]
) -> None:
    if observation.others_share is None:
        notes.append(
            "whether the server was saturated, and what CPU time others took, is not known: its "
            "process was not found, or may not be looked at (--server-pid)"
        )
    elif observation.server_cpu_s is None:
        where = "it is in the client's own process" if server_is_local else "it is on another host"
        notes.append(f"whether the server was saturated is not known: {where}")


def _judge_ports(
    seconds: float,
    opened: int,
    ports: int,
    hold_s: float,
    reasons: list[str],
    notes: list[str],
) -> None:
    def taken_within(span_s: float) -> float:
        return opened * min(1.0, span_s / seconds) if seconds > 0 else opened

    if taken_within(hold_s) > _PORTS_MOST * ports:
        reasons.append(
            f"{taken_within(hold_s):,.0f} connections were opened of {ports:,} that the ports "
            f"allow in {hold_s:g} s: use --source 127.0.0.0/8 or --close rst"
        )
    elif taken_within(_TIME_WAIT_S) > _PORTS_MOST * ports:
        notes.append(
            f"most ports were in TIME_WAIT: connect looks for one that is {hold_s:g} s old, which "
            "takes it longer; --source 127.0.0.0/8 or --close rst avoids that"
        )


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
    threads: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Histogram],
    reasons: list[str],
    notes: list[str],
) -> None:
    """In a closed loop, as many messages are outstanding as are allowed: throughput x mean service
    time has to say so (J. D. C. Little, 1961), but for those that the client itself has in hand,
    from a reply that it compares to the next message that it makes. Waiting beyond the measured
    time is no part of it."""
    if workload.mode != "closed" or not echoes or duration_s <= 0:
        return
    carried_ns = sum(one["carried_in_ns"] - one["carried_out_ns"] for one in threads)
    outstanding = (echoes * latency["service"].mean + carried_ns) / 1e9 / duration_s
    in_hand = sum(one["between_ns"] for one in threads) / 1e9 / duration_s
    expected = workload.total_connections * workload.deepest
    if (beyond := -carried_ns / 1e9 / duration_s / expected) > _BEYOND_MOST:
        notes.append(
            f"{beyond / (beyond + 1):.0%} of the messages' time lies beyond the end, and they "
            "count in full: the rate may be too high; a longer --duration, or --warmup"
        )
    if abs(outstanding + in_hand - expected) > _LITTLE_TOLERANCE * expected:
        reasons.append(
            f"throughput x mean service time is {outstanding:.1f} outstanding messages, "
            f"not {expected} (Little's law)"
        )
    elif in_hand > _LITTLE_TOLERANCE * expected:
        notes.append(
            f"the client had {in_hand / expected:.0%} of the messages in hand, to compare a reply "
            "and make the next message: the rate has that in it, the service time does not"
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
    founded = _founded(latency[names[0]])
    unfounded = [percent for percent in _PERCENTILES[1:] if percent not in founded]
    if not unfounded:
        return
    text = (
        f"{plural(count, 'sample is', 'samples are')} too few for p{unfounded[0]:g}"
        f"{' and above' if len(unfounded) > 1 else ''}: fewer than {BEYOND} lie beyond it"
    )
    (reasons if unfounded[0] <= 99 else notes).append(text)

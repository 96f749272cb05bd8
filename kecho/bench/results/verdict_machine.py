"""How the machine is judged: CPU time, quotas, ports and accept queues during a run."""

from __future__ import annotations

from ...command import plural
from ..tuning.limits import TIME_WAIT_S
from ..witness import Observation
from ..workload import Workload
from .findings import NEEDS_LONG_S, SATURATED, Findings

__all__ = ["judge_machine", "judge_ports", "judge_quotas", "judge_server"]

_OTHERS_MOST = 0.10  # of all CPU time
_STOLEN_MOST = 0.02
_PORTS_MOST = 0.8


def judge_quotas(workload: Workload, observation: Observation, findings: Findings) -> None:
    """Check that no cgroup used up its CPU quota: its processes then stop until the period ends."""
    for name, throttled, is_reason in (
        # Without a schedule, the server sets the pace.
        ("server", observation.server_throttled, workload.mode == "open"),
        ("client", observation.client_throttled, workload.mode != "stream"),
    ):
        if throttled is not None and throttled[0] > 0:
            findings.add(
                f"the {name} was throttled: in {throttled[0]:,} of "
                f"{plural(throttled[1], 'period')} its cgroup had used up its CPU quota",
                is_reason=is_reason,
            )


def judge_server(
    workload: Workload, observation: Observation, server_is_local: bool, findings: Findings
) -> None:
    """Check that the server had CPU time to spare, or say that this is not known."""
    if observation.server_cpu_s is not None:
        _judge_saturation(workload, observation, observation.server_cpu_s, findings)
    elif observation.others_share is None:
        findings.note(
            "whether the server was saturated, and what CPU time others took, is not known: its "
            "process was not found, or this user may not inspect it (--server-pid)"
        )
    else:
        where = "it is in the client's own process" if server_is_local else "it is on another host"
        findings.note(f"whether the server was saturated is not known: {where}")


def _judge_saturation(
    workload: Workload, observation: Observation, server_cpu_s: float, findings: Findings
) -> None:
    if observation.seconds < NEEDS_LONG_S:
        return
    usable = max(1, min(observation.server_threads, observation.cpus))
    share = server_cpu_s / observation.seconds
    busiest = observation.server_busiest_s / observation.seconds
    if share >= SATURATED * usable:
        text = f"the server was saturated: {share:.2f} of {usable} CPUs"
    elif busiest >= SATURATED:
        text = f"the server was saturated: one of its threads had a CPU {busiest:.0%} of the time"
    else:
        return
    # Without a schedule, the rate of a saturated server is its capacity, which is a valid figure.
    findings.add(text, is_reason=workload.mode == "open")


def judge_machine(observation: Observation, findings: Findings) -> None:
    """Check that nothing else took the CPUs, and that connects met no full queue."""
    if observation.seconds >= NEEDS_LONG_S:
        if observation.others_share is not None and observation.others_share > _OTHERS_MOST:
            findings.reason(f"other processes took {observation.others_share:.0%} of the CPU time")
        if observation.stolen_share > _STOLEN_MOST:
            findings.reason(f"the hypervisor took {observation.stolen_share:.0%} of the CPU time")
    if observation.syn_events:
        shown = ", ".join(f"{name} {count}" for name, count in observation.syn_events.items())
        findings.reason(
            f"connects met a full queue ({shown}): raise the server's backlog and "
            "net.core.somaxconn"
        )


def judge_ports(seconds: float, opened: int, ports: int, hold_s: float, findings: Findings) -> None:
    """Check that the run did not use up the ports.

    opened: connections within `seconds`. ports: how many the ports allow within hold_s.
    """

    def opened_within(span_s: float) -> float:
        return opened * min(1.0, span_s / seconds) if seconds > 0 else opened

    if opened_within(hold_s) > _PORTS_MOST * ports:
        findings.reason(
            f"{opened_within(hold_s):,.0f} connections were opened of {ports:,} that the ports "
            f"allow in {hold_s:g} s: use --source 127.0.0.0/8 or --close rst"
        )
    elif opened_within(TIME_WAIT_S) > _PORTS_MOST * ports:
        findings.note(
            f"most ports were in TIME_WAIT: connect has to search for one that is {hold_s:g} s "
            "old; --source 127.0.0.0/8 or --close rst avoids that"
        )

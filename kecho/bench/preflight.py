"""Checks before a run: whether the limits of this machine allow the workload."""

from __future__ import annotations

import socket

from ..errors import OptionError
from ..system import sysctl
from ..system.cpus import usable_cpus
from .sources import bindable
from .tuning.applied import Tuning
from .tuning.limits import TIME_WAIT_S, Limits, Needs, Problem, advice
from .workload import Workload

__all__ = [
    *("check_cpus", "check_sources", "needs_of", "port_budget", "port_hold_s", "problems"),
    "tuning_for",
]

_SPARE_DESCRIPTORS = 64  # files, pipes, and what was open before


def needs_of(workload: Workload, *, is_local: bool, backlog: int | None = None) -> Needs:
    """Return what the workload needs. is_local: the server is on this machine."""
    total = workload.total_connections
    is_tcp = workload.uds is None and not workload.udp
    at_once = workload.mode == "burst"
    rounds = workload.rounds if at_once else 1
    leaves_time_wait = is_tcp and workload.close == "fin" and not workload.clear_time_wait
    return Needs(
        # Connections that are opened a few at a time do not fill the server's queues.
        connections=total if at_once or not is_local else 0,
        sources=max(1, len(workload.source_addresses())),
        descriptors=-(-total // workload.processes),
        descriptors_extra=workload.total_threads + _SPARE_DESCRIPTORS,
        opened_total=total * rounds if leaves_time_wait else 0,
        backlog=backlog,
        local=is_local and is_tcp,
    )


def problems(workload: Workload, *, is_local: bool, backlog: int | None = None) -> list[Problem]:
    """Return the limits that the workload does not fit, fatal ones first.

    Before that, it raises the descriptor limit of this process as far as possible.
    """
    sysctl.raise_descriptor_limit()
    found = advice(needs_of(workload, is_local=is_local, backlog=backlog), Limits.read())
    if workload.uds is None and not workload.udp:
        return found
    return [one for one in found if one.limit in ("RLIMIT_NOFILE", "fs.file-max")]


def port_budget(workload: Workload) -> int:
    """Return how many connections can be opened before a port has to be reused; 0: any number."""
    if workload.uds is not None:
        return 0
    return Limits.read().ports * max(1, len(workload.source_addresses()))


def check_sources(workload: Workload) -> None:
    """Raise OptionError if it is impossible to connect from one of the source addresses."""
    for address in workload.source_addresses():
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(bindable(address))
        except OSError as error:
            raise OptionError("source", f"{address}: {error.strerror}") from None


def check_cpus(workload: Workload) -> None:
    """Raise OptionError if a client thread cannot be pinned to one of the CPUs."""
    if missing := sorted(set(workload.cpus) - set(usable_cpus())):
        raise OptionError("cpus", f"this process may not use CPU {missing[0]}")


def port_hold_s(*, is_loopback: bool) -> float:
    """Return for how long a connection that the client has closed keeps its port."""
    # With 1, or with 2 (the default) on loopback, a port in TIME_WAIT is reused after
    # tcp_tw_reuse_delay, by default a second: ip-sysctl.rst.
    if sysctl.read_sysctl("net.ipv4.tcp_tw_reuse") in ((1, 2) if is_loopback else (1,)):
        delay_ms = sysctl.read_sysctl("net.ipv4.tcp_tw_reuse_delay")
        return 1.0 if delay_ms is None else delay_ms / 1000
    return TIME_WAIT_S


def tuning_for(workload: Workload) -> Tuning:
    """Return the settings to raise while this workload runs."""
    needs = needs_of(workload, is_local=True)
    return Tuning(
        lambda: sysctl.wanted_for(workload.total_connections, needs.sources, needs.opened_total),
        descriptors=needs.descriptors + needs.descriptors_extra,
    )

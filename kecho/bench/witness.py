"""Observations of the machine during a run: CPU time, quotas, lost SYNs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..system.cgroups import throttled_periods
from ..system.netstat import tcp_counters
from .procfs import Usage, cpu_s_of, parent_of, usage_of
from .target import Target

__all__ = ["Observation", "Witness", "pid_listening_at"]

# TcpExt counters that rise when connects meet a full queue: snmp_counter.rst.
SYN_COUNTERS = (
    "ListenOverflows",
    "ListenDrops",
    "TCPSynRetrans",
    "TCPReqQFullDrop",
    "TCPReqQFullDoCookies",
)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Observation:
    """What was observed between two looks. Shares are of all CPUs over the time.

    Times are CPU time in s.
    """

    seconds: float
    cpus: int
    client_cpu_s: float
    server_cpu_s: float | None  # None: its process is not known
    server_threads: int
    others_share: float | None  # of CPU time, by other processes; None: not known
    stolen_share: float
    syn_events: dict[str, int]  # SYN_COUNTERS that have risen, and by how much
    server_busiest_s: float = 0.0  # of the server's thread that used most
    # In how many periods the cgroup's CPU quota was used up, and of how many; None: there is no
    # quota, or it is not known.
    client_throttled: tuple[int, int] | None = None
    server_throttled: tuple[int, int] | None = None


Groups = dict[Path, tuple[int, int]]  # throttled_periods()


@dataclass(frozen=True)
class _Look:
    at_s: float
    busy_s: float
    stolen_s: float
    client_s: float
    server: Usage | None
    syn: dict[str, int]
    client_groups: Groups
    server_groups: Groups


class Witness:
    """Observes the machine from its construction to observe().

    server_pid: the server's process, whose CPU time is counted apart; None if it is not known.
    client_pids: of client processes besides this one.
    """

    def __init__(self, target: Target, server_pid: int | None, client_pids: list[int]) -> None:
        self._target = target
        self._client_pids = [os.getpid(), *client_pids]
        # The CPU time of a server in the client's own process is not known apart.
        self._is_within = server_pid == os.getpid()
        self._server_pid = None if self._is_within else server_pid
        self._first = self._look()

    def _look(self) -> _Look:
        busy_s, stolen_s = _machine_cpu_s()
        server = None
        if self._server_pid is not None:
            server = usage_of(self._server_pid, without=self._client_pids)
        client_s = sum(cpu_s_of(pid) or 0.0 for pid in self._client_pids)
        syn = tcp_counters(SYN_COUNTERS)
        return _Look(
            *(time.monotonic(), busy_s, stolen_s, client_s, server, syn),
            throttled_periods(Path("/proc/self")),
            throttled_periods(Path(f"/proc/{self._server_pid}")) if self._server_pid else {},
        )

    def observe(self) -> Observation:
        """Return what has been observed since the construction."""
        first, last = self._first, self._look()
        seconds = max(last.at_s - first.at_s, 1e-9)
        cpus = os.cpu_count() or 1
        client_s = last.client_s - first.client_s
        server_s = None
        busiest_s = 0.0
        if first.server is not None and last.server is not None:
            before = first.server.threads_s
            server_s = last.server.total_s - first.server.total_s
            busiest_s = max(
                (now - before.get(thread, 0.0) for thread, now in last.server.threads_s.items()),
                default=0.0,
            )
        others = None
        if server_s is not None or self._is_within or not self._target.is_local:
            others_s = (last.busy_s - first.busy_s) - client_s - (server_s or 0.0)
            others = max(0.0, others_s / (seconds * cpus))
        return Observation(
            seconds=seconds,
            cpus=cpus,
            client_cpu_s=client_s,
            server_cpu_s=server_s,
            server_threads=len(last.server.threads_s) if last.server else 0,
            others_share=others,
            stolen_share=max(0.0, (last.stolen_s - first.stolen_s) / (seconds * cpus)),
            syn_events={
                name: more for name in last.syn if (more := last.syn[name] - first.syn.get(name, 0))
            },
            server_busiest_s=busiest_s,
            client_throttled=_throttled(first.client_groups, last.client_groups),
            server_throttled=_throttled(first.server_groups, last.server_groups),
        )


def _throttled(before: Groups, after: Groups) -> tuple[int, int] | None:
    """Return the figures of the group that was throttled most, of those a process is in."""
    more = [
        (throttled - before[group][0], periods - before[group][1])
        for group, (throttled, periods) in after.items()
        if group in before
    ]
    return max(more, default=None)


def _machine_cpu_s() -> tuple[float, float]:
    """Return CPU time used, except for interrupts, and stolen by the hypervisor: proc_stat(5)."""
    try:
        ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return 0.0, 0.0
    return sum(ticks[:3]) / _TICKS_PER_S, ticks[7] / _TICKS_PER_S


def pid_listening_at(target: Target) -> int | None:
    """Return the pid of the process that listens on a local target's port.

    If it has forked, this is the parent. None if several processes listen, or none is found.
    """
    if not target.is_local or not target.port:
        return None
    inodes = set()
    # An unconnected UDP socket is in state 07, whose name is TCP_CLOSE.
    state = "07" if target.datagrams else "0A"
    for table in ("udp", "udp6") if target.datagrams else ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == state and int(fields[1].rpartition(":")[2], 16) == target.port:
                inodes.add(f"socket:[{fields[9]}]")
    try:
        names = os.listdir("/proc")
    except OSError:  # /proc is not mounted
        return None
    owners = {int(name) for name in names if name.isdigit() and _holds(name, inodes)}
    first = [pid for pid in owners if parent_of(pid) not in owners]
    return first[0] if len(first) == 1 else None


def _holds(pid: str, inodes: set[str]) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(os.readlink(entry.path) in inodes for entry in entries)
    except OSError:
        return False

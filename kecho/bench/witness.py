"""What the machine did while a run went on: CPU time of others, SYNs dropped or sent again."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..system.cgroups import throttled_periods
from ..system.netstat import tcp_counters
from .procfs import Usage, parent_of, usage_of
from .target import Target

__all__ = ["Observation", "Witness", "pid_listening_at"]

# TcpExt counters that tell of connects in trouble: snmp_counter.rst.
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
    """Between two looks. Times in s of CPU; a share is of all CPUs over the time."""

    seconds: float
    cpus: int
    client_cpu_s: float
    server_cpu_s: float | None  # None: its process is not known
    server_threads: int
    others_share: float | None  # of CPU time in user space and kernel; None: not to be told
    stolen_share: float
    syn_events: dict[str, int]  # those that were not 0
    server_busiest_s: float = 0.0  # of its threads, the one that took most
    # Periods of the cgroup's CPU quota in which it was used up, of all; None: no quota, or unknown.
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
    """Looks when it is made, and again at observe().

    server_pid: its CPU time is told apart from that of others. client_pids: beside this process.
    """

    def __init__(self, target: Target, server_pid: int | None, client_pids: list[int]) -> None:
        self._target = target
        self._client_pids = [os.getpid(), *client_pids]
        # A server in the client's own process: its CPU time cannot be told from the client's.
        self._is_within = server_pid == os.getpid()
        self._server_pid = None if self._is_within else server_pid
        self._first = self._look()

    def _look(self) -> _Look:
        busy_s, stolen_s = _machine_cpu_s()
        server = None
        if self._server_pid is not None:
            server = usage_of(self._server_pid, without=self._client_pids)
        client_s = sum(_process_cpu_s(pid) or 0.0 for pid in self._client_pids)
        syn = tcp_counters(SYN_COUNTERS)
        return _Look(
            *(time.monotonic(), busy_s, stolen_s, client_s, server, syn),
            throttled_periods(Path("/proc/self")),
            throttled_periods(Path(f"/proc/{self._server_pid}")) if self._server_pid else {},
        )

    def observe(self) -> Observation:
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
    """Of the groups that a process is in, the one that was throttled most meanwhile."""
    more = [
        (throttled - before[group][0], periods - before[group][1])
        for group, (throttled, periods) in after.items()
        if group in before
    ]
    return max(more, default=None)


def _machine_cpu_s() -> tuple[float, float]:
    """Busy in user space and kernel, but for interrupts; stolen by the hypervisor: proc_stat(5)."""
    try:
        ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return 0.0, 0.0
    return sum(ticks[:3]) / _TICKS_PER_S, ticks[7] / _TICKS_PER_S


def _process_cpu_s(pid: int) -> float | None:
    """proc_pid_stat(5); the name, field 2, may hold blanks and parentheses."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    except (OSError, ValueError, IndexError):
        return None


def pid_listening_at(target: Target) -> int | None:
    """The process here that listens on a local target's port, if it may be looked for; of one that
    has forked, the first. None if there are several."""
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
    except OSError:  # it is not mounted
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

"""Checks whether a run fits the current limits, and the command that helps if it does not.

All functions except ``Limits.read()`` are pure.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...system import sysctl

__all__ = ["TIME_WAIT_S", "Limits", "Needs", "Problem", "advice"]

TIME_WAIT_S = 60  # TCP_TIMEWAIT_LEN, a constant of the kernel
_RESERVED_PORTS = "net.ipv4.ip_local_reserved_ports"
_PORTS = "ephemeral ports"
_UNLIMITED = 2**63 - 1  # for RLIM_INFINITY, and for fs.file-max without a limit
_NR_OPEN_DEFAULT = 1024 * 1024


@dataclass(frozen=True)
class Needs:
    """What a run needs from its machine.

    connections: how many are open at once, and may all be opened at the same instant.
    sources: how many local addresses they come from.
    descriptors: how many connections one client process opens; 0: descriptors are not checked.
    descriptors_extra: what else that process has open: epoll sets, files, what was open before.
    opened_total: how many connections the run opens in total if it closes them with FIN, which
        leaves each in TIME_WAIT; 0 if it closes with RST. (On loopback the kernel reuses such a
        port after a second: tcp_tw_reuse is 2 by default since Linux 4.19. But it searches longer.)
    backlog: what the server passes to listen(2); None if that is not known.
    local: the server is on this machine. Then the limits read here are those of its queues, and any
        address of 127.0.0.0/8 can be a source.
    """

    connections: int
    sources: int = 1
    descriptors: int = 0
    descriptors_extra: int = 0
    opened_total: int = 0
    backlog: int | None = None
    local: bool = True


@dataclass(frozen=True)
class Limits:
    """The current limits: sysctls of the kernel, and RLIMIT_NOFILE of this process.

    port_range: the first and last ephemeral port.
    reserved_ports: how many ports of that range ip_local_reserved_ports excludes.
    file_max: descriptors of all processes together. nr_open: the highest hard limit that even root
        can set: proc_sys_fs(5).
    syncookies: whether SYN cookies are used when needed, the default. Then the kernel ignores
        tcp_max_syn_backlog (tcp_conn_request() in net/ipv4/tcp_input.c).
    """

    somaxconn: int
    syn_backlog: int
    port_range: tuple[int, int]
    reserved_ports: int
    nofile_soft: int
    nofile_hard: int
    file_max: int
    nr_open: int
    widest_port_range: tuple[int, int] = (1024, 65535)
    syncookies: bool = True

    @classmethod
    def read(cls, *, root: Path | None = None) -> Limits:
        """Read the current limits. root: a directory in the place of /proc/sys."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        port_range = sysctl.read_port_range(root=root)
        return cls(
            somaxconn=sysctl.somaxconn(root=root),
            syn_backlog=sysctl.read_syn_backlog(root=root),
            port_range=port_range,
            reserved_ports=_reserved_ports(port_range, root),
            nofile_soft=_UNLIMITED if soft == resource.RLIM_INFINITY else soft,
            nofile_hard=_UNLIMITED if hard == resource.RLIM_INFINITY else hard,
            file_max=sysctl.read_sysctl("fs.file-max", root=root) or _UNLIMITED,
            nr_open=sysctl.read_sysctl("fs.nr_open", root=root) or _NR_OPEN_DEFAULT,
            widest_port_range=sysctl.widest_port_range(root=root),
            syncookies=sysctl.read_sysctl("net.ipv4.tcp_syncookies", root=root) in (1, 2),
        )

    @property
    def ports(self) -> int:
        """How many connections one local address can have to one destination."""
        first, last = self.port_range
        return max(0, last - first + 1 - self.reserved_ports)


@dataclass(frozen=True)
class Problem:
    """A limit that a run does not fit.

    limit: its name: a sysctl, ``RLIMIT_NOFILE``, ``backlog`` or ``ephemeral ports``.
    value: what it is. needed: what it has to be at least.
    fatal: the run is impossible; otherwise it is possible, but its numbers are not valid.
    effect: what happens because of it.
    command: what helps: a shell command, or an option of the benchmark or of the server.
    """

    limit: str
    value: int
    needed: int
    fatal: bool
    effect: str
    command: str

    @property
    def needs_root(self) -> bool:
        """Whether the command needs root."""
        return self.command.startswith(("sysctl ", "prlimit "))

    def __str__(self) -> str:
        how = "as root" if self.needs_root else "try"
        verb = "are" if self.limit == _PORTS else "is"
        is_needed = f"{self.limit} {verb} {self.value}, this run needs {self.needed}"
        return f"{is_needed}: {self.effect}; {how}: {self.command}"


def advice(needs: Needs, limits: Limits) -> list[Problem]:
    """Return what a run does not fit: first what makes it impossible."""
    found = [*_descriptors(needs, limits), *_ports(needs, limits), *_queues(needs, limits)]
    return sorted(found, key=lambda problem: not problem.fatal)


def _descriptors(needs: Needs, limits: Limits) -> Iterator[Problem]:
    needed = needs.descriptors + needs.descriptors_extra
    if needs.descriptors == 0:
        return
    if needed > limits.nofile_hard:
        # Raising the hard limit needs CAP_SYS_RESOURCE, and nr_open is the highest possible value.
        command = f"prlimit --pid $$ --nofile={needed}:{needed}"
        if needed > limits.nr_open:
            command = f"sysctl -w fs.nr_open={needed} && {command}"
        effect = "each connection takes a descriptor, and this is the hard limit"
        yield Problem("RLIMIT_NOFILE", limits.nofile_hard, needed, True, effect, command)
    elif needed > limits.nofile_soft:
        effect = "each connection takes a descriptor"
        command = f"ulimit -n {needed}"
        yield Problem("RLIMIT_NOFILE", limits.nofile_soft, needed, True, effect, command)
    if needed > limits.file_max:
        effect = "all processes together can open no more files"
        command = f"sysctl -w fs.file-max={2 * needed}"
        yield Problem("fs.file-max", limits.file_max, needed, True, effect, command)


def _ports(needs: Needs, limits: Limits) -> Iterator[Problem]:
    available = limits.ports * needs.sources
    if needs.connections > available:
        effect = "each source address has at most one connection per port of ip_local_port_range"
        command = _more_ports(needs, limits, needs.connections)
        yield Problem(_PORTS, available, needs.connections, True, effect, command)
    elif needs.opened_total > available:
        effect = f"each connection closed with FIN keeps its port for {TIME_WAIT_S} s in TIME_WAIT"
        command = _more_ports(needs, limits, needs.opened_total)
        yield Problem(_PORTS, available, needs.opened_total, False, effect, command)


def _more_ports(needs: Needs, limits: Limits, needed: int) -> str:
    first = min(limits.port_range[0], limits.widest_port_range[0])
    last = max(limits.port_range[1], limits.widest_port_range[1])
    width = last - first + 1 - limits.reserved_ports
    if needed <= width * needs.sources:
        return f'sysctl -w {sysctl.PORT_RANGE}="{first} {last}"'
    if needs.local:
        return "--source 127.0.0.0/8"
    if needed > needs.connections:
        return "--close rst"
    return f"--source with {-(-needed // max(1, limits.ports))} addresses of this machine"


def _queues(needs: Needs, limits: Limits) -> Iterator[Problem]:
    if not needs.local:
        return
    late = "a connect that meets a full queue takes a second or more"
    if needs.backlog is not None and needs.backlog < needs.connections:
        command = f"--backlog {needs.connections} for the server"
        yield Problem("backlog", needs.backlog, needs.connections, False, late, command)
    elif limits.somaxconn < needs.connections:
        effect = f"listen() makes no longer queue, and {late}"
        command = f"sysctl -w {sysctl.SOMAXCONN}={sysctl.somaxconn_for(needs.connections)}"
        yield Problem(sysctl.SOMAXCONN, limits.somaxconn, needs.connections, False, effect, command)
    # Without cookies, the kernel keeps the last quarter for peers that it knows.
    needed = -(-needs.connections * 4 // 3)
    if not limits.syncookies and limits.syn_backlog < needed:
        effect = "SYN cookies are off, so handshakes beyond 3/4 of it take a second or more"
        command = f"sysctl -w {sysctl.SYN_BACKLOG}={sysctl.syn_backlog_for(needs.connections)}"
        yield Problem(sysctl.SYN_BACKLOG, limits.syn_backlog, needed, False, effect, command)


def _reserved_ports(port_range: tuple[int, int], root: Path | None) -> int:
    """Return how many ports of the range are reserved: ``1,2-4,10-10`` in ip-sysctl.rst."""
    try:
        text = sysctl.read_sysctl_text(_RESERVED_PORTS, root=root)
        reserved = set[int]()
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            reserved.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return 0
    return sum(port_range[0] <= port <= port_range[1] for port in reserved)

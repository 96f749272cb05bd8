"""Kernel limits that a server or a benchmark meets: read them, raise them, say what is wanted.

The facts are those of ip(7), tcp(7), listen(2), getrlimit(2) and of the kernel's
Documentation/networking/ip-sysctl.rst, tried on Linux 6.18. The three sysctls of
``wanted_for()`` belong to a network namespace, each (the last since Linux 4.11).
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

__all__ = [
    "backlog_in_force",
    "descriptor_limit",
    "migrates_requests",
    "open_descriptors",
    "raise_descriptor_limit",
    "read_sysctl",
    "read_sysctl_text",
    "somaxconn",
    "wanted_for",
    "write_sysctl",
]

SOMAXCONN = "net.core.somaxconn"
SYN_BACKLOG = "net.ipv4.tcp_max_syn_backlog"
PORT_RANGE = "net.ipv4.ip_local_port_range"
MIGRATE_REQUESTS = "net.ipv4.tcp_migrate_req"
UNPRIVILEGED_START = "net.ipv4.ip_unprivileged_port_start"

_SYSCTL_ROOT = Path("/proc/sys")
_SOMAXCONN_DEFAULT = 4096  # since Linux 5.4: listen(2)
_SYN_BACKLOG_DEFAULT = 128  # the least there is: ip-sysctl.rst
_PORT_RANGE_DEFAULT = (32768, 60999)  # ip(7)
_UNPRIVILEGED_START_DEFAULT = 1024
_NOFILE_DEFAULT = 1024  # the kernel's own soft limit
_PORT_MAX = 65535
_U16_MAX = 65535
_INT_MAX = 2**31 - 1


def _path(name: str, root: Path | None) -> Path:
    return (_SYSCTL_ROOT if root is None else root) / name.replace(".", "/")


def read_sysctl_text(name: str, *, root: Path | None = None) -> str:
    """The value of a sysctl as text, one space between its words; OSError if it cannot be read.

    root: a directory in the place of /proc/sys.
    """
    return " ".join(_path(name, root).read_text(encoding="ascii", errors="replace").split())


def write_sysctl(name: str, text: str, *, root: Path | None = None) -> None:
    """Sets a sysctl; OSError if that is refused. Needs root: proc_sys(5).

    One write(2) of the whole value: the kernel ignores or refuses what comes at another offset.
    """
    with _path(name, root).open("wb", buffering=0) as file:
        file.write(f"{text}\n".encode("ascii"))


def check_writable(name: str, *, root: Path | None = None) -> None:
    """OSError if this process may not set the sysctl. Sets nothing.

    Opening asks the kernel itself: neither root in a container (/proc/sys may be read-only there)
    nor another user with CAP_NET_ADMIN in the network's namespace would be judged by a uid.
    """
    # Not "wb": that truncates, which the kernel takes no notice of, but a plain file does.
    with _path(name, root).open("r+b", buffering=0):
        pass


def read_sysctl(name: str, *, root: Path | None = None) -> int | None:
    """The value of a numeric sysctl such as ``net.core.somaxconn``; None if it cannot be read."""
    try:
        return int(read_sysctl_text(name, root=root))
    except (OSError, ValueError):
        return None


def read_port_range(*, root: Path | None = None) -> tuple[int, int]:
    """net.ipv4.ip_local_port_range: the first and last port that connect(2) picks from."""
    try:
        first, last = map(int, read_sysctl_text(PORT_RANGE, root=root).split())
    except (OSError, ValueError):
        return _PORT_RANGE_DEFAULT
    return first, last


def read_syn_backlog(*, root: Path | None = None) -> int:
    """net.ipv4.tcp_max_syn_backlog."""
    value = read_sysctl(SYN_BACKLOG, root=root)
    return _SYN_BACKLOG_DEFAULT if value is None else value


def somaxconn(*, root: Path | None = None) -> int:
    """net.core.somaxconn: what listen(2) silently truncates a backlog to."""
    value = read_sysctl(SOMAXCONN, root=root)
    return _SOMAXCONN_DEFAULT if value is None else value


def backlog_in_force(backlog: int) -> int:
    """What the kernel makes of a backlog: listen(2)."""
    return min(backlog, somaxconn())


def descriptor_limit() -> int:
    """RLIMIT_NOFILE, the soft one."""
    return _descriptor_limits()[0]


def migrates_requests(*, root: Path | None = None) -> bool | None:
    """net.ipv4.tcp_migrate_req: whether clients of a listener that closes go on to another one of
    its SO_REUSEPORT group. Of this network namespace; None if it cannot be read (Linux 5.14)."""
    value = read_sysctl(MIGRATE_REQUESTS, root=root)
    return None if value is None else value == 1


def open_descriptors() -> int:
    """Of this process; 0 if it cannot be read. proc_pid_fd(5)."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the one that lists them
    except OSError:
        return 0


def _descriptor_limits() -> tuple[int, int]:
    try:
        return resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:  # what confines this process may refuse it
        return _NOFILE_DEFAULT, _NOFILE_DEFAULT


def raise_descriptor_limit() -> int:
    """Raises RLIMIT_NOFILE of this process to its hard limit, and returns what is in force.

    Every connection is a descriptor, and the usual soft limit is 1024: getrlimit(2).
    """
    soft, hard = _descriptor_limits()
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard


def somaxconn_for(connections: int) -> int:
    """The somaxconn under which so many connections fit an accept queue at once.

    A power of two, but 65535 rather than 65536: the kernel once kept a backlog in 16 bits, and
    refused more (EINVAL). A kernel that still does refuses what is beyond, and cannot do it.
    """
    if connections <= _U16_MAX:
        return min(_power_of_two(connections), _U16_MAX)
    return min(_power_of_two(connections), _INT_MAX)


def syn_backlog_for(connections: int) -> int:
    """The tcp_max_syn_backlog under which so many handshakes are under way at once.

    With SYN cookies, the default, the kernel bounds half-open connections by the listener's
    backlog alone. Without, it also keeps the last quarter of this for peers it knows
    (tcp_conn_request() in net/ipv4/tcp_input.c): hence a third more.
    """
    return min(_power_of_two(-(-connections * 4 // 3)), _INT_MAX)


def widest_port_range(*, root: Path | None = None) -> tuple[int, int]:
    """The widest ip_local_port_range that may be set, privileged ports left out.

    The kernel refuses one that begins below ip_unprivileged_port_start (usually 1024). The ends
    should be of different parity (ip-sysctl.rst): connect(2) takes one parity first, then the
    other.

    It takes in the ports that services listen on. connect(2) passes over every port that some
    socket has been bound to explicitly, so a server that already listens is not disturbed. One
    that starts while connections are open may find its port in use (EADDRINUSE): start servers
    first, or list their ports in net.ipv4.ip_local_reserved_ports.
    """
    start = read_sysctl(UNPRIVILEGED_START, root=root)
    first = max(1, _UNPRIVILEGED_START_DEFAULT if start is None else start)
    return max(first, _UNPRIVILEGED_START_DEFAULT), _PORT_MAX


def wanted_for(
    connections: int, sources: int = 1, opened_total: int = 0, *, root: Path | None = None
) -> dict[str, str]:
    """The sysctls, with values, that a run wants raised; what suffices already is left out.

    connections: how many are open at once, and may all be opened at one instant.
    sources: how many addresses they come from: each has the whole port range to a destination.
    opened_total: how many the run opens altogether if it closes them with FIN: each then keeps
        its port for 60 s, in TIME_WAIT.

    The accept queue and the SYN queue are to hold all connections. Ports are to be at least four
    times as many as needed: connect(2) looks for a free one by trying, so it takes longer the
    fuller the range is, and runs before this one have left their TIME_WAIT.

    A listener keeps the backlog it got from listen(2): somaxconn helps those that start later.
    """
    wanted = {}
    if somaxconn(root=root) < (needed := somaxconn_for(connections)):
        wanted[SOMAXCONN] = str(needed)
    if read_syn_backlog(root=root) < (needed := syn_backlog_for(connections)):
        wanted[SYN_BACKLOG] = str(needed)
    first, last = read_port_range(root=root)
    if 4 * max(connections, opened_total) > (last - first + 1) * sources:
        widest = widest_port_range(root=root)
        wider = min(first, widest[0]), max(last, widest[1])
        if wider != (first, last):
            wanted[PORT_RANGE] = "{} {}".format(*wider)
    return wanted


def _power_of_two(number: int) -> int:
    """The least one that is not below the number."""
    return 1 << max(0, number - 1).bit_length()

"""Kernel limits that a server meets: read them, say which one is in the way, raise what is ours."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["backlog_in_force", "raise_descriptor_limit", "somaxconn"]

_SYSCTL_ROOT = Path("/proc/sys")
_SOMAXCONN_DEFAULT = 4096  # since Linux 5.4: listen(2)


def read_sysctl(name: str) -> int | None:
    """The value of a numeric sysctl such as ``net.core.somaxconn``; None if it cannot be read."""
    try:
        return int((_SYSCTL_ROOT / name.replace(".", "/")).read_text())
    except (OSError, ValueError):
        return None


def somaxconn() -> int:
    """net.core.somaxconn: what listen(2) silently truncates a backlog to."""
    value = read_sysctl("net.core.somaxconn")
    return _SOMAXCONN_DEFAULT if value is None else value


def backlog_in_force(backlog: int) -> int:
    """What the kernel makes of a backlog: listen(2)."""
    return min(backlog, somaxconn())


def raise_descriptor_limit() -> int:
    """Raises RLIMIT_NOFILE of this process to its hard limit, and returns what is in force.

    Every connection is a descriptor, and the usual soft limit is 1024: getrlimit(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard

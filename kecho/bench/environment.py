"""The machine of a run: what is needed to compare or repeat it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from .._version import __version__
from ..system.cpus import usable_cpu_count

__all__ = ["describe"]

_SYSCTLS = (
    "net.core.somaxconn",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_congestion_control",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "net.ipv4.tcp_tw_reuse",
    "net.core.busy_poll",
)


def describe() -> dict[str, Any]:
    """Return versions, CPUs, memory, sysctls and the command line."""
    return {
        "kecho": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "sysctls": {name: text for name in _SYSCTLS if (text := _sysctl(name)) is not None},
        "command": list(sys.orig_argv),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"


def _sysctl(name: str) -> str | None:
    try:
        return " ".join(Path("/proc/sys", *name.split(".")).read_text().split())
    except OSError:
        return None

"""How many CPUs this process may use: its affinity, and the CPU quota of its cgroups."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .cgroups import cgroup_cpu_quota

__all__ = ["usable_cpu_count", "usable_cpus", "whole_cpu_count"]


def usable_cpus() -> list[int]:
    """The CPU numbers of the affinity mask, ascending: sched_getaffinity(2). All there are if that
    is refused."""
    try:
        return sorted(os.sched_getaffinity(0))
    except OSError:
        return list(range(os.cpu_count() or 1))


def usable_cpu_count() -> int:
    """How many threads can run at once: the affinity, or the cgroup quota if that is less."""
    allowed = len(usable_cpus())
    quota = cgroup_cpu_quota(Path("/proc/self"))
    if quota is None:
        return allowed
    return max(1, min(allowed, math.ceil(quota)))


def whole_cpu_count() -> int:
    """How many threads can run all the time: the affinity, or the whole CPUs of the quota."""
    allowed = len(usable_cpus())
    quota = cgroup_cpu_quota(Path("/proc/self"))
    return allowed if quota is None else min(allowed, math.floor(quota))

"""How many CPUs this process may use: its affinity, and the CPU quota of its cgroups."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["cpu_groups", "throttled_periods", "usable_cpu_count", "usable_cpus", "whole_cpu_count"]


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


def cgroup_cpu_quota(proc_self: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup above this process grants; None: no quota.

    Reads cpu.max (cgroup v2) and cpu.cfs_quota_us (v1), of the process's group and of each above
    it. What cannot be read sets no limit. proc_self: /proc/self, or a directory like it.
    """
    quotas = [
        quota
        for group, mount_point in cpu_groups(proc_self)
        for directory in _from_group_to_root(mount_point, group)
        if (quota := _quota_v2(directory) or _quota_v1(directory)) is not None
    ]
    return min(quotas, default=None)


def cpu_groups(proc_self: Path) -> Iterator[tuple[str, Path]]:
    """(the group's path, where its hierarchy is mounted): cgroups(7), proc_pid_mountinfo(5)."""
    mounts: dict[str, tuple[str, Path]] = {}
    for line in _lines(proc_self / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = [_unescape(word) for word in before.split()], after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, mount_point = fields[3], Path(fields[4])
        if kind[0] == "cgroup2":
            mounts.setdefault("", (root, mount_point))
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            mounts.setdefault("cpu", (root, mount_point))
    for line in _lines(proc_self / "cgroup"):
        _, controllers, group = (line.split(":", 2) + ["", ""])[:3]
        name = "cpu" if "cpu" in controllers.split(",") else controllers
        if name in mounts:
            root, mount_point = mounts[name]
            # In a container the mount shows a subtree: the group's path starts at its root.
            yield group.removeprefix(root if root != "/" else ""), mount_point


def throttled_periods(proc: Path) -> dict[Path, tuple[int, int]]:
    """Of a process's cgroups that have a CPU quota, by directory: the periods in which it was used
    up, and all of them, since the group was made. proc: /proc/PID.

    Reads cpu.stat, cgroup v1 and v2: sched-bwc.rst. What cannot be read is left out.
    """
    found = {}
    for group, mount_point in cpu_groups(proc):
        for directory in _from_group_to_root(mount_point, group):
            counts = dict(line.split() for line in _lines(directory / "cpu.stat"))
            with suppress(KeyError, ValueError):
                found[directory] = int(counts["nr_throttled"]), int(counts["nr_periods"])
    return found


def _unescape(word: str) -> str:
    """Undoes the octal escapes of space, tab, newline and backslash in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)


def _from_group_to_root(mount_point: Path, group: str) -> Iterator[Path]:
    directory = mount_point / group.strip("/")
    while directory != mount_point and mount_point in directory.parents:
        yield directory
        directory = directory.parent
    yield mount_point


def _quota_v2(directory: Path) -> float | None:
    words = " ".join(_lines(directory / "cpu.max")).split()
    return _quota(words[0], words[1]) if len(words) == 2 else None


def _quota_v1(directory: Path) -> float | None:
    quota = _lines(directory / "cpu.cfs_quota_us")
    period = _lines(directory / "cpu.cfs_period_us")
    return _quota(quota[0], period[0]) if quota and period else None


def _quota(quota_us: str, period_us: str) -> float | None:
    # "max" (v2) and "-1" (v1) mean that there is none.
    if not quota_us.isdigit() or not period_us.isdigit() or int(period_us) == 0:
        return None
    return int(quota_us) / int(period_us)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

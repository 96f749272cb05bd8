"""What the cgroups of this process grant: CPU time and memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["cgroup_cpu_quota", "cgroup_memory_limit", "groups_of", "throttled_periods"]

_UNLIMITED = 1 << 62


def cgroup_cpu_quota(proc_self: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup above this process grants; None: no quota.

    Reads cpu.max (cgroup v2) and cpu.cfs_quota_us (v1), of the process's group and of each above
    it. What cannot be read sets no limit. proc_self: /proc/self, or a directory like it.
    """
    quotas = [
        quota
        for group, mount_point in groups_of("cpu", proc_self)
        for directory in _from_group_to_root(mount_point, group)
        if (quota := _quota_v2(directory) or _quota_v1(directory)) is not None
    ]
    return min(quotas, default=None)


def cgroup_memory_limit(proc_self: Path) -> int | None:
    """Bytes that the tightest cgroup above this process grants; None: no limit.

    Reads memory.max and memory.high (cgroup v2) and memory.limit_in_bytes (v1), of the process's
    group and of each above it. What cannot be read sets no limit.
    """
    limits = [
        int(limit)
        for group, mount_point in groups_of("memory", proc_self)
        for directory in _from_group_to_root(mount_point, group)
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        # "max" (v2) means that there is none, the most that pages can count (v1) as well.
        if (limit := "".join(_lines(directory / name))).isdigit() and int(limit) < _UNLIMITED
    ]
    return min(limits, default=None)


def throttled_periods(proc: Path) -> dict[Path, tuple[int, int]]:
    """Of a process's cgroups that have a CPU quota, by directory: the periods in which it was used
    up, and all of them, since the group was made. proc: /proc/PID.

    Reads cpu.stat, cgroup v1 and v2: sched-bwc.rst. What cannot be read is left out.
    """
    found = {}
    for group, mount_point in groups_of("cpu", proc):
        for directory in _from_group_to_root(mount_point, group):
            counts = dict(line.split() for line in _lines(directory / "cpu.stat"))
            with suppress(KeyError, ValueError):
                found[directory] = int(counts["nr_throttled"]), int(counts["nr_periods"])
    return found


def groups_of(controller: str, proc_self: Path) -> Iterator[tuple[str, Path]]:
    """(the group's path, where its hierarchy is mounted), of a controller such as "cpu": in its own
    hierarchy (v1) and in the common one (v2). cgroups(7), proc_pid_mountinfo(5)."""
    mounts: dict[str, tuple[str, Path]] = {}
    for line in _lines(proc_self / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = [_unescape(word) for word in before.split()], after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, mount_point = fields[3], Path(fields[4])
        if kind[0] == "cgroup2":
            mounts.setdefault("", (root, mount_point))
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            mounts.setdefault(controller, (root, mount_point))
    for line in _lines(proc_self / "cgroup"):
        _, controllers, group = (line.split(":", 2) + ["", ""])[:3]
        name = controller if controller in controllers.split(",") else controllers
        if name in mounts:
            root, mount_point = mounts[name]
            # In a container the mount shows a subtree: the group's path starts at its root.
            yield group.removeprefix(root if root != "/" else ""), mount_point


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

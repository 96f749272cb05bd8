"""CPU time of processes, alone or with all their descendants: proc_pid_stat(5)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "cpu_s_of", "exists", "parent_of", "usage_of"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_UTIME, _CUTIME, _PPID = 11, 13, 1  # fields after the name, counted from 0


@dataclass(frozen=True)
class Usage:
    """CPU time in seconds.

    total_s: of all current threads, and of children that have ended. threads_s: by thread.
    """

    total_s: float
    threads_s: dict[int, float]


def cpu_s_of(pid: int) -> float | None:
    """Return the CPU time of one process in seconds; None if it is not known."""
    stat = _stat(f"/proc/{pid}/stat")
    return None if stat is None else _seconds(stat, _UTIME)


def usage_of(pid: int, without: Collection[int] = ()) -> Usage | None:
    """Return the CPU time of a process and its descendants.

    None if there is no such process, or it may not be inspected. without: processes to leave out,
    with their descendants.
    """
    total_s = 0.0
    threads_s: dict[int, float] = {}
    found = False
    for process in _tree(pid, without):
        stat = _stat(f"/proc/{process}/stat")
        if stat is None:
            continue
        found = True
        total_s += _seconds(stat, _UTIME) + _seconds(stat, _CUTIME)
        for thread in _threads(process):
            one = _stat(f"/proc/{process}/task/{thread}/stat")
            if one is not None:
                threads_s[thread] = _seconds(one, _UTIME)
    return Usage(total_s, threads_s) if found else None


def exists(pid: int) -> bool:
    """Return whether a process exists, even if /proc does not show it (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def parent_of(pid: int) -> int | None:
    """Return the pid of the parent; None if it is not known."""
    stat = _stat(f"/proc/{pid}/stat")
    return None if stat is None else int(stat[_PPID])


def _tree(pid: int, without: Collection[int]) -> Iterator[int]:
    """Yield a process and its descendants. Children of a process that has ended are not found."""
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        if one in without:
            continue
        yield one
        for thread in _threads(one):
            try:
                children = Path(f"/proc/{one}/task/{thread}/children").read_text()
            except OSError:  # the thread has ended, or there is no CONFIG_PROC_CHILDREN
                continue
            waiting += map(int, children.split())


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _stat(path: str) -> list[str] | None:
    """Return the fields after the name, which may contain blanks and parentheses."""
    try:
        return Path(path).read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _seconds(stat: list[str], field: int) -> float:
    """Return time in user space plus kernel, which are neighbouring fields."""
    return (int(stat[field]) + int(stat[field + 1])) / _TICKS_PER_S

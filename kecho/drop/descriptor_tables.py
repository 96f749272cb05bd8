"""Which threads share a table of descriptors: kcmp(2), where the kernel tells."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from functools import cmp_to_key
from itertools import pairwise

__all__ = ["one_of_each_table"]

_NUMBERS = {"x86_64": 312, "aarch64": 272}  # of the call: <asm/unistd.h>
_KCMP_FILES = 2  # <linux/kcmp.h>


def one_of_each_table(tasks: Sequence[int]) -> Sequence[int]:
    """Of these threads one for each table, or all of them where that cannot be told.

    A thousand threads that share one take a thousand calls; with many tables, as many as sorting
    takes: who has made them cannot have them compared each with each.
    """
    if len(tasks) < 2 or (compare := _kcmp()) is None:
        return tasks
    ordered = sorted(tasks, key=cmp_to_key(compare))
    return ordered[:1] + [task for before, task in pairwise(ordered) if compare(before, task)]


def _kcmp() -> Callable[[int, int], int] | None:
    """Of two threads -1, 0 (they share their table) or 1; None if the kernel does not tell."""
    try:
        import ctypes  # some milliseconds, for processes with threads alone
    except ImportError:  # of a Python built without libffi
        return None
    number = _NUMBERS.get(platform.machine())
    if number is None or not _are_numbers_ours():
        return None
    call = ctypes.CDLL(None).syscall

    def compare(one: int, other: int) -> int:
        # 3: they differ, without an order; -1: it failed, such as for a thread that has ended.
        return {0: 0, 1: -1}.get(call(number, one, other, _KCMP_FILES, 0, 0), 1)

    return compare


def _are_numbers_ours() -> bool:
    """Whether those in /proc are the ones that calls take: it may be of another namespace."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False

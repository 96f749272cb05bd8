"""Faults injected into a server process: the rules of shim.c, and what they have done.

The rules lie in a file that the server maps, too: they change while it runs, so that one process
lives through many faults.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

CALLS = (
    *("accept4", "recv", "send", "epoll_wait", "epoll_ctl", "setsockopt", "connect", "close"),
    *("eventfd_write", "sched_yield", "malloc", "aligned_alloc", "epoll_create1", "eventfd"),
)
ACTIONS_MOST = 64
WHOSE = {"any": 0, "listener": 1, "other": 2}


class Rule(ctypes.Structure):
    """`struct rule` of shim.c."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("armed", "skip", "every", "per_mille", "most")),
        *((name, ctypes.c_uint32) for name in ("detail", "whose", "action_count")),
        ("actions", ctypes.c_int32 * ACTIONS_MOST),
        *((name, ctypes.c_uint64) for name in ("seed", "matched", "injected", "calls")),
    )


def build(compiler: str, directory: Path) -> Path:
    """Compiles the shim; raises CalledProcessError."""
    shim = directory / "shim.so"
    command = [compiler, "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    source = Path(__file__).with_name("shim.c")
    subprocess.run([*command, "-o", shim, source, "-ldl"], env=environment, check=True, timeout=60)
    return shim


def short(size: int) -> int:
    """An action: the call gets `size` bytes at most."""
    return -size


class Faults:
    """What a server that was started with `environment` meets."""

    def __init__(self, shim: Path, file: Path) -> None:
        size = ctypes.sizeof(Rule) * len(CALLS)
        file.write_bytes(bytes(size))
        self.environment = {"LD_PRELOAD": str(shim), "FAULTS": str(file)}
        with file.open("r+b") as opened:
            self._mapped = mmap.mmap(opened.fileno(), size)

    def close(self) -> None:
        self._mapped.close()

    def _offset(self, call: str, name: str = "armed") -> int:
        field: int = getattr(Rule, name).offset
        return CALLS.index(call) * ctypes.sizeof(Rule) + field

    def _read(self, call: str, name: str) -> int:
        return ctypes.c_uint64.from_buffer_copy(self._mapped, self._offset(call, name)).value

    def inject(
        self,
        call: str,
        actions: Sequence[int],
        *,
        skip: int = 0,
        every: int = 1,
        chance: float | None = None,
        most: int = 0,
        detail: int = 0,
        whose: str = "any",
        seed: int = 0,
    ) -> None:
        """From now on calls fail: all but the first `skip`, every so many-th or by `chance`,
        `most` times (0: without end), in turn or at random by each of `actions`, an errno or
        short(n). detail: only for this operation of epoll_ctl, or option of setsockopt.
        """
        self.clear(call)
        rule = Rule(
            skip=skip,
            every=0 if chance is not None else every,
            per_mille=round(1000 * (chance or 0)),
            most=most,
            detail=detail,
            whose=WHOSE[whose],
            action_count=len(actions),
            actions=(ctypes.c_int32 * ACTIONS_MOST)(*actions),
            seed=seed,
        )
        # `calls` stays; the rule is complete before it is armed.
        begin, end = self._offset(call, "skip"), self._offset(call, "calls")
        self._mapped[begin:end] = bytes(rule)[Rule.skip.offset : Rule.calls.offset]
        self._mapped[self._offset(call)] = 1

    def clear(self, *calls: str) -> None:
        """No more faults of these calls, or of any. What was counted stays until inject()."""
        for call in calls or CALLS:
            self._mapped[self._offset(call)] = 0

    def injected(self, call: str) -> int:
        """Faults since inject()."""
        return self._read(call, "injected")

    def calls(self, *calls: str) -> int:
        """What the engine has called since the process began, failed or not."""
        return sum(self._read(call, "calls") for call in calls or CALLS)


def errnos(text: str) -> list[int]:
    """Of their names, parted by spaces."""
    return [getattr(errno, name) for name in text.split()]

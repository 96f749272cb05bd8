"""The kernel's TCP counters of a network namespace: /proc/PID/net/netstat, snmp_counter.rst."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["TcpCounters", "tcp_counters"]

_PATH = Path("/proc/thread-self/net/netstat")
_LONGEST = 64 * 1024


def _parse(text: str, names: Iterable[str]) -> dict[str, int]:
    lines = text.splitlines()
    for heads, values in zip(lines[::2], lines[1::2], strict=False):
        if heads.startswith("TcpExt:"):
            table = dict(zip(heads.split()[1:], values.split()[1:], strict=False))
            return {name: int(table[name]) for name in names if name in table}
    return {}


def tcp_counters(names: Iterable[str]) -> dict[str, int]:
    """The TcpExt counters of these names that there are, in the calling thread's namespace."""
    try:
        return _parse(_PATH.read_text(), names)
    except OSError:
        return {}


class TcpCounters:
    """Counters of the namespace in which it was made, also when files can no longer be opened."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        try:
            self._fd = os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def read(self) -> dict[str, int]:
        """Those that there are."""
        if self._fd < 0:
            return {}
        try:
            return _parse(os.pread(self._fd, _LONGEST, 0).decode("ascii", "replace"), self._names)
        except OSError:
            return {}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

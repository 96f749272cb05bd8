"""Drops the TIME_WAIT sockets of a run, and no others: --clear-time-wait."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from .. import drop
from ..errors import OptionError
from .target import Target

__all__ = ["Sweeper"]

_END_BYTES = 18
_CAP_NET_ADMIN = 12  # capabilities(7)
_TRIES = 20  # looks for a socket that is not in TIME_WAIT yet, before it is given up
_SETTLE_S = 0.02
_INTERVAL_S = 0.5


class Sweeper:
    """Keeps the local ends of connections that the run closed until they are dropped.

    Raises OptionError without CAP_NET_ADMIN. A socket is dropped by its whole tuple and the
    kernel's cookie, in TIME_WAIT only.
    """

    def __init__(self, target: Target) -> None:
        if not _may_drop():
            raise OptionError("clear_time_wait", "needs CAP_NET_ADMIN, which root has")
        self._peer = (socket.inet_ntop(target.family, target.address), target.port)
        self._family = target.family
        self._tries: dict[tuple[str, int], int] = {}
        self._swept_at_s = time.monotonic()
        self.dropped = 0

    def is_due(self) -> bool:
        return time.monotonic() - self._swept_at_s >= _INTERVAL_S

    def sweep(self, ends: bytes) -> None:
        """ends: of connections closed since the last time, as _loadgen.Client.take_ends()."""
        width = 4 if self._family == socket.AF_INET else 16
        for begin in range(0, len(ends), _END_BYTES):
            end = ends[begin : begin + _END_BYTES]
            where = socket.inet_ntop(self._family, end[:width])
            self._tries[where, int.from_bytes(end[16:], "big")] = 0
        if self._tries:
            self._drop()
        self._swept_at_s = time.monotonic()

    def finish(self, ends: bytes) -> None:
        """The last sweep: waits a moment for those whose FIN is still under way."""
        self.sweep(ends)
        while self._tries:
            time.sleep(_SETTLE_S)
            self.sweep(b"")

    def _drop(self) -> None:
        pairs = [(*end, *self._peer) for end in self._tries]
        for outcome in drop.drop(drop.find(pairs, states=["time-wait"])):
            if outcome.result in (drop.Result.DROPPED, drop.Result.GONE):
                self.dropped += outcome.result is drop.Result.DROPPED
                local = outcome.pair.local
                self._tries.pop((str(local.address), local.port), None)
        for end in list(self._tries):
            self._tries[end] += 1
            if self._tries[end] >= _TRIES:
                del self._tries[end]


def _may_drop() -> bool:
    """CAP_NET_ADMIN is effective: proc_pid_status(5)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    except OSError:
        pass
    return False

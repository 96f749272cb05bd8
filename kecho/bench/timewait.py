"""Drops the TIME_WAIT sockets of a run, and no others (--clear-time-wait)."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from pathlib import Path

from .. import drop
from ..errors import OptionError
from .target import Target

__all__ = ["Sweeper"]

_PORT_AT, _COOKIE_AT, _END_BYTES = 16, 18, 26
_CAP_NET_ADMIN = 12  # capabilities(7)
_TRIES = 20  # how often to look for a socket that is not in TIME_WAIT yet
_SETTLE_S = 0.02
_INTERVAL_S = 0.5


class Sweeper:
    """Drops the sockets that the connections of a run leave in TIME_WAIT.

    A socket is identified by its addresses, its ports, and the cookie that it had when it was open.
    It is dropped only in TIME_WAIT. Raises OptionError without CAP_NET_ADMIN.

    dropped: how many sockets were dropped.
    freed: how many ports are free again. That includes ports of connections that were reset, and
        had no TIME_WAIT, or whose port a new connection has reused (tcp_tw_reuse).
    """

    def __init__(self, target: Target) -> None:
        if not _may_drop():
            raise OptionError("clear_time_wait", "needs CAP_NET_ADMIN, which root has")
        self._peer = (socket.inet_ntop(target.family, target.address), target.port)
        self._family = target.family
        # By cookie. A socket keeps its cookie in TIME_WAIT, and no other socket with the same
        # address and port has the same one.
        self._ends: dict[int, tuple[str, int]] = {}
        self._tries: Counter[int] = Counter()
        self._absent: set[int] = set()
        self._swept_at_s = time.monotonic()
        self.dropped = self.freed = 0

    def is_due(self) -> bool:
        """Return whether it is time for the next sweep."""
        return time.monotonic() - self._swept_at_s >= _INTERVAL_S

    def sweep(self, ends: bytes) -> None:
        """Drop what is in TIME_WAIT.

        ends: of connections closed since the last sweep, as _loadgen.Client.take_ends().
        """
        width = 4 if self._family == socket.AF_INET else 16
        for begin in range(0, len(ends), _END_BYTES):
            end = ends[begin : begin + _END_BYTES]
            address = socket.inet_ntop(self._family, end[:width])
            port = int.from_bytes(end[_PORT_AT:_COOKIE_AT], "big")
            cookie = int.from_bytes(end[_COOKIE_AT:], sys.byteorder)
            self._ends[cookie] = (address, port)
        if self._ends:
            self._drop()
        self._swept_at_s = time.monotonic()

    def finish(self, ends: bytes) -> None:
        """Sweep for the last time, and wait a moment for connections that still exchange FINs."""
        self.sweep(ends)
        while self._ends:
            time.sleep(_SETTLE_S)
            self.sweep(b"")

    def _drop(self) -> None:
        pairs = [(*end, *self._peer) for end in self._ends.values()]
        there = {one.cookie: one for one in drop.find(pairs)}
        waiting = []
        for cookie in list(self._ends):
            found = there.get(cookie)
            if found is None:
                self._note_absent(cookie)
            elif found.state == "time-wait":
                waiting.append(found)
            else:
                self._note_try(cookie)
        for found, outcome in zip(waiting, drop.drop(waiting), strict=True):
            if outcome.result in (drop.Result.DROPPED, drop.Result.GONE):
                self.dropped += outcome.result is drop.Result.DROPPED
                self._forget(found.cookie, freed=True)
            else:
                self._note_try(found.cookie)

    def _note_try(self, cookie: int) -> None:
        self._tries[cookie] += 1
        if self._tries[cookie] >= _TRIES:
            self._forget(cookie, freed=False)

    def _note_absent(self, cookie: int) -> None:
        # One look is not enough: while sockets come and go, the kernel's dump may miss one.
        if cookie in self._absent:
            self._forget(cookie, freed=True)
        else:
            self._absent.add(cookie)

    def _forget(self, cookie: int, *, freed: bool) -> None:
        self.freed += freed
        self._absent.discard(cookie)
        self._tries.pop(cookie, None)
        del self._ends[cookie]


def _may_drop() -> bool:
    """Return whether CAP_NET_ADMIN is effective: proc_pid_status(5)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    except OSError:
        pass
    return False

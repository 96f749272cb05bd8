"""The network namespace that the command works in, looked up anew for each look of --watch."""

from __future__ import annotations

import os

from .. import command
from . import outcome as outcomes
from .diag import Diag
from .failure import Absent, Failure, open_diag
from .netns import as_found

__all__ = ["Place"]


class Place:
    """netns: as of open_namespace(), or None for the thread's own."""

    def __init__(self, netns: str | None) -> None:
        self._netns = netns
        self.is_own = netns is None
        self._where: str | None = None
        self._first: tuple[int, int] | None = None

    def open(self) -> Diag:
        """A handle, which the caller closes: while it is open, it keeps the namespace alive.

        From the second time on, a name or a path may lead to another namespace, and a process may
        not: its number may be that of another one by now. Raises Failure.
        """
        if self._netns is None or self._where is None:
            self._where = as_found(self._netns) if self._netns is not None else ""
            diag = open_diag(self._netns)
            self._first = diag.namespace
            return diag
        try:
            diag = open_diag(self._where)
        except Failure as failure:
            if failure.status != command.EXIT_USAGE:
                raise
            if self._is_process:
                raise self._ended() from None
            raise Absent(failure.text, failure.status) from None
        if self._is_process and diag.namespace != self._first:
            diag.close()
            raise self._ended()
        return diag

    def _ended(self) -> Failure:
        text = f"--netns {self._netns}: the process has ended, or left the namespace"
        return Failure(text, outcomes.EXIT_NOT_DROPPED)

    @property
    def _is_process(self) -> bool:
        where = self._where or ""
        try:
            return where.startswith("pid:") or os.path.realpath(where).startswith("/proc/")
        except OSError:  # only a link of a zombie is there and cannot be read: proc_pid_ns(5)
            return True

"""Lines on stderr that do not wait for ever for somebody to read them."""

from __future__ import annotations

import logging
import math
import os
import select
import sys
import time
from typing import TextIO

from ..printable import printable

__all__ = ["PATIENCE_S", "PatientHandler", "stderr_handler"]

PATIENCE_S = 5.0  # for a reader who takes nothing; what comes before it takes something is lost
_CHUNK_BYTES = 4096  # PIPE_BUF: where there is room at all, as much does not block: pipe(7)


class PatientHandler(logging.StreamHandler[TextIO]):
    """Writes each line at once. A reader that has stopped (a pipe that is full, a terminal after
    Ctrl-S) delays the process by PATIENCE_S once, and not its end any more.

    A terminal that has room need not have enough, and a write to it then waits for the rest, unless
    its file description is non-blocking. So it gets one of its own: the stream's is others', too.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._terminal_fd = _open_terminal(stream.fileno())  # raises if it has none
        self._lost = 0  # lines, since it stopped reading
        self._is_cut = False  # the last line has no end

    def setStream(self, stream: TextIO) -> TextIO | None:
        self._close_terminal()
        return super().setStream(stream)

    def close(self) -> None:
        self._close_terminal()
        super().close()

    def _close_terminal(self) -> None:
        if self._terminal_fd >= 0:
            os.close(self._terminal_fd)
            self._terminal_fd = -1

    def emit(self, record: logging.LogRecord) -> None:
        """Under the lock, so that no other thread waits beside this one."""
        try:
            patience_s = PATIENCE_S
            if self._lost:
                text = f"lines lost because nobody read them: {self._lost}"
                lost = logging.makeLogRecord({"msg": text, **_WARNING})
                if not self._write(self.format(lost), 0.0):
                    self._lost += 1
                    return
                self._lost, patience_s = 0, 0.0
            if not self._write(self.format(record), patience_s):
                self._lost += 1
        except Exception:
            self.handleError(record)  # it has gone away, say: no reason to stop

    def _write(self, line: str, patience_s: float) -> bool:
        """Whether all of it was taken."""
        text = ("\n" if self._is_cut else "") + printable(line) + "\n"
        rest = text.encode(self.stream.encoding or "utf-8", "backslashreplace")
        fd = self._terminal_fd if self._terminal_fd >= 0 else self.stream.fileno()
        room = select.poll()
        room.register(fd, select.POLLOUT)
        end = time.monotonic() + patience_s
        while rest:
            left_s = max(0.0, end - time.monotonic())
            if not room.poll(math.ceil(left_s * 1000)):
                return False
            try:
                rest = rest[os.write(fd, rest[:_CHUNK_BYTES]) :]
            except BlockingIOError:  # it has less room than that
                if not left_s:
                    return False
                time.sleep(min(left_s, 0.01))
                continue
            self._is_cut = bool(rest)
        return True


def _open_terminal(fd: int) -> int:
    """A non-blocking description of the terminal `fd`; -1: it is none, or another user's."""
    if not os.isatty(fd):
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return -1


def stderr_handler() -> logging.Handler:
    try:
        return PatientHandler(sys.stderr)
    except (AttributeError, OSError, TypeError, ValueError):  # None, or it has no descriptor
        return logging.StreamHandler(sys.stderr)


_WARNING = {"levelno": logging.WARNING, "levelname": "WARNING", "name": "kecho"}

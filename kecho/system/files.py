"""Opening what was looked at, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["open_checked"]

_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_checked(path: str, check: Callable[[os.stat_result], object]) -> int:
    """A descriptor to read from, which the caller closes, if check() raises nothing.

    Nothing else is opened, though the path leads elsewhere by then: a FIFO would wait for a writer,
    and a device might do something. Where /proc is not mounted, which that takes (O_PATH, open(2)),
    the path is looked up again, and what was opened is checked. Raises OSError, and what check()
    does.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        check(os.fstat(place))
        if os.path.exists(f"/proc/self/fd/{place}"):
            return os.open(f"/proc/self/fd/{place}", _READING)
        fd = os.open(path, _READING)
    finally:
        os.close(place)
    try:
        check(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd

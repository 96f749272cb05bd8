"""Which process holds a socket, proc_pid_fd(5), and whether it can be seen at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from ..system.processes import start_time
from .descriptor_tables import one_of_each_table
from .devices import as_name

__all__ = ["PID_MOST", "Holder", "Process", "Unseen", "holders", "namespace_of", "raise_unseen"]

PID_MOST = 1 << 22  # PID_MAX_LIMIT of <linux/threads.h>


class Holder(NamedTuple):
    pid: int
    name: str


class Unseen(PermissionError):
    """It may be there, but cannot be seen by this process. strerror says why."""


def raise_unseen(pid: int) -> NoReturn:
    """Why /proc has no such process, or tells nothing of it.

    Raises ProcessLookupError: there is none, or it has ended and is a zombie; Unseen: there is one,
    which is hidden (hidepid=, proc(5)), or /proc is not mounted.
    """
    if not os.path.exists("/proc/self"):
        raise Unseen(errno.ENOENT, "/proc is not mounted, so that processes cannot be seen")
    if os.path.exists(f"/proc/{pid}"):
        raise_ended(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError as error:
        raise ProcessLookupError(error.errno, f"there is no process {pid}") from None
    except PermissionError:
        pass
    raise Unseen(
        errno.EACCES, f"process {pid} cannot be seen, as /proc is mounted with hidepid: use sudo"
    )


class Process:
    """The process that has a number when it is first looked at, and no later one of that number.

    The user of one that has ended can have the numbers go round, so that somebody else's next
    process gets it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start: int | None = None
        self.has_ended = False

    def inodes(self) -> set[int]:
        """The sockets that it holds. Raises ProcessLookupError if it has ended, and Unseen."""
        if self.has_ended:
            raise_ended(self.pid)
        if self._start is None:
            self._start = self._started()
        try:
            found = inodes_of(self.pid)
            # What was read in between may be of another process.
            if self._started() != self._start or self._start is None:
                raise_ended(self.pid)
        except ProcessLookupError:
            self.has_ended = True
            raise
        return found

    def _started(self) -> int | None:
        try:
            return start_time(self.pid, zombie=True)
        except PermissionError:
            raise_unreadable(self.pid)


def raise_ended(pid: int) -> NoReturn:
    raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")


def raise_unreadable(pid: int) -> NoReturn:
    raise Unseen(
        errno.EACCES,
        f"the descriptors of process {pid} may not be read: those of another user's process"
        " need CAP_SYS_PTRACE, use sudo",
    )


def inodes_of(pid: int) -> set[int]:
    """The sockets that a process holds, by any of its threads: one may have a table of descriptors
    of its own (CLONE_FILES, unshare(2)), and that of the first has gone when it has ended. Raises
    ProcessLookupError if there is no such process, and Unseen."""
    try:
        tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        raise_unseen(pid)
    except PermissionError:
        raise_unreadable(pid)
    found: set[int] = set()
    is_readable = False
    for task in one_of_each_table(tasks):
        directory = f"/proc/{pid}/task/{task}/fd"
        try:
            found |= _sockets_in(directory, os.listdir(directory))
            is_readable = True
        except PermissionError:
            continue
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            is_readable = True
    if not is_readable:
        raise_unreadable(pid)
    return found


def namespace_of(pid: int | str) -> tuple[int, int] | None:
    """Device and inode of the network namespace of a process; None if that cannot be seen."""
    try:
        found = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sockets_in(directory: str, names: list[str]) -> set[int]:
    found = set()
    for name in names:
        try:
            target = os.readlink(f"{directory}/{name}")
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found


def holders(inodes: Iterable[int]) -> dict[int, Holder]:
    """inode -> the first process that holds it, of those whose descriptors we may read."""
    wanted = set(inodes) - {0}
    found: dict[int, Holder] = {}
    try:
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    except OSError:
        return found
    for pid in pids:
        if len(found) == len(wanted):
            break
        try:
            held = inodes_of(pid) & wanted
            if held:
                with open(f"/proc/{pid}/comm", "rb") as file:
                    name = as_name(file.read().removesuffix(b"\n"))
                for inode in held:
                    found.setdefault(inode, Holder(pid, name))
        except OSError:
            continue  # ended meanwhile, or somebody else's
    return found

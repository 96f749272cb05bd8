"""The file that says which kernel settings a tuned run has changed, so that it can be undone.

It is there before the first change and until the last value is back. What a run killed by SIGKILL
has left behind is found by it. Root acts on what it says, so nobody else may have written it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import TuningError
from ...system.directories import NO_OTHERS, Directory, open_directory

__all__ = ["Change", "State", "StateFile", "default_state_file"]

_DIRECTORY = Path("/run/kecho")
_VERSION = 1
_MAX_BYTES = 64 * 1024
_LOCK_TIMEOUT_S = 2.0  # it is held for milliseconds
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_-]+)+")


def default_state_file() -> Path:
    """One for each network namespace, as the sysctls are."""
    return _DIRECTORY / f"tuning-{network_namespace()}.json"


def network_namespace() -> int:
    """The inode of this thread's network namespace: namespaces(7)."""
    return int(os.readlink("/proc/thread-self/ns/net").strip("net:[]"))


def boot_id() -> str:
    """Different after each boot, which puts sysctls back to what they are at boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None if it runs no more.

    With the pid it names a process for good: pids are used again. See proc_pid_stat(5).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # from the third on; the second may have any character
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended


@dataclass(frozen=True)
class Change:
    """The value of a sysctl before a run, and what the run sets it to."""

    old: str
    new: str


@dataclass(frozen=True)
class State:
    """What a run has changed or is about to, and who it is."""

    changes: Mapping[str, Change]
    pid: int = field(default_factory=os.getpid)
    start_time: int | None = field(default_factory=lambda: start_time(os.getpid()))
    boot_id: str = field(default_factory=boot_id)
    netns: int = field(default_factory=network_namespace)

    @property
    def is_of_this_boot(self) -> bool:
        return self.boot_id == boot_id()

    @property
    def is_running(self) -> bool:
        """The run's process is still there."""
        return self.is_of_this_boot and start_time(self.pid) == self.start_time

    def to_json(self) -> str:
        values = {name: {"old": one.old, "new": one.new} for name, one in self.changes.items()}
        fields = {
            "version": _VERSION,
            "pid": self.pid,
            "start_time": self.start_time,
            "boot_id": self.boot_id,
            "netns": self.netns,
            "values": values,
        }
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> State:
        """ValueError if it is not what to_json() makes."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("no object")
        if fields.get("version") != _VERSION:
            raise ValueError(f"version {fields.get('version')!r}, not {_VERSION}")
        values = _typed(fields, "values", dict)
        for name in values:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no sysctl")
        return cls(
            changes={
                name: Change(_typed(change, "old", str), _typed(change, "new", str))
                for name, change in values.items()
            },
            pid=_typed(fields, "pid", int),
            start_time=_typed(fields, "start_time", int),
            boot_id=_typed(fields, "boot_id", str),
            netns=_typed(fields, "netns", int),
        )


def _typed(fields: Any, name: str, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if type(value) is not kind:
        raise ValueError(f"no {name}")
    return value


class StateFile:
    """A state file in a directory that only its owner can write. Every OSError is a TuningError.

    The directory is opened once, and the file only through it, never through a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory: Directory | None = None

    def open(self, *, create: bool) -> bool:
        """Opens the directory; False if there is none and none is to be made."""
        with self._telling(self.path.parent):
            above = open_directory(str(self.path.parent.parent))
            try:
                fd = self._open_in(above, create=create)
            finally:
                above.close()
            if fd is None:
                return False
            self._directory = Directory(fd, str(self.path.parent))
            try:
                _check_owner(self.path.parent, os.fstat(fd))
            except BaseException:
                self.close()
                raise
        return True

    def _open_in(self, above: Directory, *, create: bool) -> int | None:
        name = self.path.parent.name
        if create:
            above.make(name, 0o700)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, dir_fd=above.fd)
        except FileNotFoundError:
            if create:
                raise
            return None

    @property
    def _opened(self) -> Directory:
        assert self._directory is not None, "open() comes first"
        return self._directory

    def close(self) -> None:
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within `with`, no other run begins, nor puts back what one has left behind."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._opened.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = "locked by another run that is about to begin or being put back"
                    raise TuningError(f"{self.path.parent}: {reason}") from None
                time.sleep(0.01)
        try:
            yield
        finally:
            # Not left to close(): a child process may have the descriptor as well.
            fcntl.flock(self._opened.fd, fcntl.LOCK_UN)

    def read(self) -> State | None:
        """None if there is none."""
        # O_NONBLOCK: opening a FIFO would wait for somebody who writes to it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._telling(self.path):
            try:
                fd = os.open(self.path.name, flags, dir_fd=self._opened.fd)
            except FileNotFoundError:
                return None
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise TuningError(f"{self.path}: not a file")
                _check_owner(self.path, status)
                text = os.read(fd, _MAX_BYTES)
            finally:
                os.close(fd)
        try:
            return State.from_json(text)
        except (ValueError, RecursionError) as error:
            reason = f"not a state file ({error}); nothing was changed"
            raise TuningError(f"{self.path}: {reason}") from None

    def write(self, state: State) -> None:
        """Whole or not at all, and on the disk when it returns."""
        temporary = f"{self.path.name}.new"
        with self._telling(self.path):
            self._opened.remove(temporary)  # of a run that was killed while it wrote
            with self._opened.new_file(name=temporary) as (fd, _):
                with open(fd, "w", encoding="ascii") as file:
                    file.write(state.to_json())
                    file.flush()
                    os.fsync(fd)
                self._opened.rename(temporary, self.path.name)
            os.fsync(self._opened.fd)

    def remove(self) -> None:
        with self._telling(self.path):
            self._opened.remove(self.path.name)

    @contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        try:
            yield
        except TuningError:
            raise
        except OSError as error:
            # A symbolic link: ELOOP, and ENOTDIR with O_DIRECTORY.
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
                raise TuningError(f"{path}: a symbolic link, which is not followed") from None
            hint = "; this needs root" if isinstance(error, PermissionError) else ""
            raise TuningError(f"{path}: {error.strerror}{hint}") from error


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise TuningError(f"{path}: belongs to another user ({status.st_uid}), not to be trusted")
    if status.st_mode & NO_OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise TuningError(f"{path}: others may write it (mode {mode:04o}), not to be trusted")

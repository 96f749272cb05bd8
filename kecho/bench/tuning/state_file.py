"""The file that lists the kernel settings a tuned run has changed, so that they can be restored.

It exists from before the first change until the last value is restored. After SIGKILL it is what
tells which values to restore. Root acts on its content, so only root or its owner may write it.
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
from ...system.processes import start_time

__all__ = ["Change", "State", "StateFile", "default_state_file"]

_DIRECTORY = Path("/run/kecho")
_VERSION = 1
_MAX_BYTES = 64 * 1024
_LOCK_TIMEOUT_S = 2.0  # it is held for milliseconds
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_-]+)+")


def default_state_file() -> Path:
    """Return the path of the state file of this network namespace, which has its own sysctls."""
    return _DIRECTORY / f"tuning-{network_namespace()}.json"


def network_namespace() -> int:
    """Return the inode of this thread's network namespace: namespaces(7)."""
    return int(os.readlink("/proc/thread-self/ns/net").strip("net:[]"))


def boot_id() -> str:
    """Return the id of this boot. Each boot resets the sysctls."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True)
class Change:
    """The value of a sysctl before a run, and the one that the run sets."""

    old: str
    new: str


@dataclass(frozen=True)
class State:
    """What a run changes, and which process it is."""

    changes: Mapping[str, Change]
    pid: int = field(default_factory=os.getpid)
    start_time: int | None = field(default_factory=lambda: start_time(os.getpid()))
    boot_id: str = field(default_factory=boot_id)
    netns: int = field(default_factory=network_namespace)

    @property
    def is_of_this_boot(self) -> bool:
        """Whether it was written since the last boot."""
        return self.boot_id == boot_id()

    @property
    def is_running(self) -> bool:
        """Whether the run's process still exists."""
        return self.is_of_this_boot and start_time(self.pid) == self.start_time

    def to_json(self) -> str:
        """Return the state as JSON."""
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
        """Read what to_json() returned. Raise ValueError for anything else."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        if fields.get("version") != _VERSION:
            raise ValueError(f"version {fields.get('version')!r}, not {_VERSION}")
        values = _typed(fields, "values", dict)
        for name in values:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a sysctl")
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
    """Reads and writes a state file, in a directory that only its owner can write to.

    The directory is opened once, and the file only through it, never through a symbolic link.
    OSErrors are raised as TuningError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory: Directory | None = None

    def open(self, *, create: bool) -> bool:
        """Open the directory. Return False if there is none; `create` makes it."""
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
        """Close the directory."""
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs, within `with`, from beginning or restoring."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._opened.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = "locked by another run that is beginning or being restored"
                    raise TuningError(f"{self.path.parent}: {reason}") from None
                time.sleep(0.01)
        try:
            yield
        finally:
            # Not left to close(): a child process may have a copy of the descriptor.
            fcntl.flock(self._opened.fd, fcntl.LOCK_UN)

    def read(self) -> State | None:
        """Return the state; None if there is no file."""
        # O_NONBLOCK: otherwise opening a FIFO would wait for a writer.
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
        """Write the file as a whole or not at all. It is on the disk on return."""
        temporary = f"{self.path.name}.new"
        with self._telling(self.path):
            self._opened.remove(temporary)  # left by a run that was killed while writing
            with self._opened.new_file(name=temporary) as (fd, _):
                with open(fd, "w", encoding="ascii") as file:
                    file.write(state.to_json())
                    file.flush()
                    os.fsync(fd)
                self._opened.rename(temporary, self.path.name)
            os.fsync(self._opened.fd)

    def remove(self) -> None:
        """Remove the file."""
        with self._telling(self.path):
            self._opened.remove(self.path.name)

    @contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        """Raise OSErrors within `with` as TuningErrors that name the path."""
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
        raise TuningError(
            f"{path}: belongs to another user ({status.st_uid}) and cannot be trusted"
        )
    if status.st_mode & NO_OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise TuningError(f"{path}: others may write it (mode {mode:04o}), so it cannot be trusted")

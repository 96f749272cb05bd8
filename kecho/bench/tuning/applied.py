"""Kernel settings that are raised for a run, and restored however the run ends.

    with Tuning(lambda: wanted_for(1000), descriptors=1100) as tuning:
        ...

After SIGKILL nothing is restored; ``restore_leftover()`` then restores what the run has changed.
"""

from __future__ import annotations

import atexit
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from ...errors import TuningError
from ...system.sysctl import check_writable, read_sysctl_text, write_sysctl
from .state_file import Change, State, StateFile, default_state_file, network_namespace
from .uninterrupted import uninterrupted

__all__ = ["Restored", "Tuning", "restore_leftover"]

_ATTEMPTS = 100  # a signal may end an attempt before it begins


@dataclass(frozen=True)
class Restored:
    """What happened to a sysctl that a run had set.

    old: its value before the run. new: what the run set. found: its value when it was to be
        restored; None if that could not be read.
    outcome: ``restored``; ``untouched`` (it had its old value already); ``changed`` (another
        process had set it, so it was left alone); ``failed`` (see reason).
    """

    name: str
    old: str
    new: str
    found: str | None
    outcome: Literal["restored", "untouched", "changed", "failed"]
    reason: str = ""

    def __str__(self) -> str:
        match self.outcome:
            case "restored":
                return f"{self.name}: restored from {self.new} to {self.old}"
            case "untouched":
                return f"{self.name}: is {self.old}, as before"
            case "changed":
                set_by_others = f"set to {self.found} by another process meanwhile"
                return f"{self.name}: {set_by_others}, left alone (it was {self.old})"
            case "failed":
                return f"{self.name}: not restored to {self.old}: {self.reason}"


class Tuning:
    """Raise settings within `with`, and restore them at its end.

    wanted: sysctl -> value, or a function that returns that. No value is lowered. The function is
        called again after the changes of a killed run are restored, because ``wanted_for()`` looks
        at the current values.
    descriptors: how many this process has to be able to open (RLIMIT_NOFILE, also of children).
    state_file: by default that of the network namespace. Its directory is made if necessary.
    root: a directory in the place of /proc/sys.

    Raises TuningError, before anything is changed, without privileges, if another tuned run is
    under way, or if the state file cannot be trusted. When the kernel refuses a value, those set
    before it are restored.

    Use it on one thread. Signals interrupt Python only in the main thread. There, signals that come
    while values are set or restored take effect afterwards.

    leftover: what a killed run had changed, restored on entering.
    changes: what this run changes: sysctl -> its old and new value.
    notes: what could not be raised without being an error, in sentences.
    restored: what happened to each change, after the end.
    """

    def __init__(
        self,
        wanted: Mapping[str, str] | Callable[[], Mapping[str, str]],
        *,
        descriptors: int = 0,
        state_file: Path | None = None,
        root: Path | None = None,
    ) -> None:
        self._wanted = wanted
        self._descriptors = descriptors
        self._state_file = state_file
        self._root = root
        self._file: StateFile | None = None
        self._is_written = False
        self._spare_fd = -1
        self._limits: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._pid = 0  # of the process that has to restore; 0: nothing to restore
        self.leftover: list[Restored] = []
        self.changes: Mapping[str, Change] = {}
        self.notes: list[str] = []
        self.restored: list[Restored] = []

    def __enter__(self) -> Tuning:
        if self._pid:
            raise RuntimeError("this Tuning is in use")
        try:
            with uninterrupted():
                self._apply()
        except BaseException as error:
            self._restore_surely()
            self._raise_failures(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore_surely()
        self._raise_failures(error)

    def _apply(self) -> None:
        self.changes, self.notes, self.restored = {}, [], []
        for name in self._evaluate():
            _check_writable(name, self._root)
        self._pid = os.getpid()
        # A second SIGINT may come before the first line of __exit__. Then only this restores.
        atexit.register(self._restore_surely)
        self._file = StateFile(self._state_file or default_state_file())
        self._file.open(create=True)
        with self._file.locked():
            self.leftover = _restore_leftover(self._file, self._root)
            if failed := [one for one in self.leftover if one.outcome == "failed"]:
                raise TuningError(f"changed by an earlier run: {failed[0]}")
            changes = _changes(self._evaluate(), self._root)
            # Written without a change as well: no other run may lower what this one relies on.
            self._is_written = True
            self._file.write(State(changes))
            self.changes = changes
        for name, change in changes.items():
            _set_and_verify(name, change.new, self._root)
        self._raise_descriptor_limit()
        # All descriptors may be in use at the end, and restoring needs one.
        self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _evaluate(self) -> Mapping[str, str]:
        return self._wanted() if callable(self._wanted) else self._wanted

    def _raise_descriptor_limit(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = self._descriptors
        if _amount(before[0]) >= needed:
            return
        after = (needed, before[1] if _amount(before[1]) >= needed else needed)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, after)
        except (OSError, ValueError):
            after = (before[1], before[1])
            self.notes.append(
                f"RLIMIT_NOFILE is raised only to {before[1]}, not to {needed}: "
                "this process may not raise its hard limit (CAP_SYS_RESOURCE, up to fs.nr_open)"
            )
            resource.setrlimit(resource.RLIMIT_NOFILE, after)
        self._limits = before, after

    def _restore_surely(self) -> None:
        interrupted: BaseException | None = None
        for _ in range(_ATTEMPTS):
            if self._pid != os.getpid():  # done; or a forked child, which must not restore
                break
            try:
                with uninterrupted():
                    try:
                        self._restore()
                    finally:
                        self._pid = 0
            except BaseException as error:  # raised by a signal, before or after
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _restore(self) -> None:
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1
        self.restored = [_restore(name, one, self._root) for name, one in self.changes.items()]
        if self._file is not None:
            if self._is_written and all(one.outcome != "failed" for one in self.restored):
                try:
                    self._file.remove()
                except TuningError as error:
                    self.notes.append(str(error))
            self._file.close()
            self._file, self._is_written = None, False
        if self._limits is not None:
            before, after = self._limits
            self._limits = None
            if resource.getrlimit(resource.RLIMIT_NOFILE) == after:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            else:
                self.notes.append(
                    "RLIMIT_NOFILE was set by another process meanwhile, and is left alone"
                )
        atexit.unregister(self._restore_surely)

    def _raise_failures(self, error: BaseException | None) -> None:
        """Raise TuningError for values that were not restored, or add them to `error`."""
        failed = [str(one) for one in self.restored if one.outcome == "failed"]
        if not failed:
            return
        if error is None:
            raise TuningError("; ".join(failed))
        for one in failed:
            error.add_note(one)


def restore_leftover(state_file: Path | None = None, *, root: Path | None = None) -> list[Restored]:
    """Restore what a killed run has changed, if there is a state file of one.

    The state file is removed, unless a value could not be restored (outcome ``failed``). A state
    file from before the last boot is only removed: the boot has restored everything. Raises
    TuningError, and changes nothing, if the run is still under way, or the file cannot be trusted
    or is that of another network namespace.
    """
    try:
        file = StateFile(state_file or default_state_file())
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise TuningError(f"the network namespace is not known: {reason}") from error
    with uninterrupted():
        try:
            if not file.open(create=False):
                return []
            with file.locked():
                return _restore_leftover(file, root)
        finally:
            file.close()


def _restore_leftover(file: StateFile, root: Path | None) -> list[Restored]:
    state = file.read()
    if state is None:
        return []
    if not state.is_of_this_boot:
        file.remove()
        return []
    if state.is_running:
        raise TuningError(f"another tuned run is under way: process {state.pid} ({file.path})")
    if state.netns != network_namespace():
        where = f"network namespace {state.netns}, this is {network_namespace()}"
        raise TuningError(f"{file.path}: from {where}; nothing was changed")
    restored = [_restore(name, change, root) for name, change in state.changes.items()]
    if all(one.outcome != "failed" for one in restored):
        file.remove()
    return restored


def _restore(name: str, change: Change, root: Path | None) -> Restored:
    found = None
    try:
        found = read_sysctl_text(name, root=root)
        if found == change.old:
            return Restored(name, change.old, change.new, found, "untouched")
        if found != change.new:
            return Restored(name, change.old, change.new, found, "changed")
        _set_and_verify(name, change.old, root)
    except OSError as error:
        reason = error.strerror or str(error)
        return Restored(name, change.old, change.new, found, "failed", reason)
    return Restored(name, change.old, change.new, found, "restored")


def _set_and_verify(name: str, text: str, root: Path | None) -> None:
    try:
        write_sysctl(name, text, root=root)
        found = read_sysctl_text(name, root=root)
    except OSError as error:
        raise TuningError(f"{name} cannot be set to {text}: {error.strerror}") from error
    if found != text:
        raise TuningError(f"{name} was set to {text}, but is {found}")


def _check_writable(name: str, root: Path | None) -> None:
    try:
        check_writable(name, root=root)
    except OSError as error:
        reason = f"{error.strerror}; tuning needs root, and a /proc/sys that can be written"
        raise TuningError(f"{name} cannot be changed: {reason}") from error


def _changes(wanted: Mapping[str, str], root: Path | None) -> dict[str, Change]:
    """Return the wanted values that are higher than the current ones."""
    changes = {}
    for name, text in wanted.items():
        try:
            old = read_sysctl_text(name, root=root)
        except OSError as error:
            raise TuningError(f"{name} cannot be read: {error.strerror}") from error
        new = _higher(old, " ".join(text.split()))
        if new != old:
            changes[name] = Change(old, new)
    return changes


def _higher(old: str, new: str) -> str:
    """Return the higher of two numbers, or the range that contains both of two ranges."""
    try:
        before, after = [*map(int, old.split())], [*map(int, new.split())]
    except ValueError:
        return new
    if len(before) == len(after) == 2:
        return f"{min(before[0], after[0])} {max(before[1], after[1])}"
    return old if len(before) == len(after) == 1 and before[0] >= after[0] else new


def _amount(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit

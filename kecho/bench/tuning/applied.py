"""Kernel settings raised for the length of a run, and put back whatever becomes of the run.

    with Tuning(lambda: wanted_for(1000), descriptors=1100) as tuning:
        ...

After SIGKILL nothing runs any more: ``restore_leftover()`` puts back what the run has changed.
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

_ATTEMPTS = 100  # each is one that a signal has kept from beginning


@dataclass(frozen=True)
class Restored:
    """What became of a sysctl that a run had set.

    old: its value before the run; new: what the run set; found: what it was when it was to be put
    back; None if that could not be read.
    outcome: ``restored``; ``untouched`` (it had its old value, nothing was to be done); ``changed``
        (somebody else has set it meanwhile, so it was left alone); ``failed`` (see reason).
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
                return f"{self.name}: put back from {self.new} to {self.old}"
            case "untouched":
                return f"{self.name}: is {self.old}, as it was"
            case "changed":
                set_by_others = f"set to {self.found} by somebody else meanwhile"
                return f"{self.name}: {set_by_others}, left alone (it was {self.old})"
            case "failed":
                return f"{self.name}: not put back to {self.old}: {self.reason}"


class Tuning:
    """A context manager: settings are raised within `with`, and put back at its end.

    wanted: sysctl -> value, or a function that returns this, asked again after what a killed run
        left behind is put back (``wanted_for()`` looks at the values in force). None is lowered.
    descriptors: how many this process is to be able to open (RLIMIT_NOFILE, here and in children).
    state_file: the default is that of the network namespace; its directory is made if need be.
    root: a directory in the place of /proc/sys.

    TuningError, before anything has been changed: no privileges, another tuned run under way, a
    state file that cannot be trusted. When a value is refused, those set before it are put back.

    Use it on one thread. Of the threads there are, only the main one is interrupted by signals in
    Python; there, signals that come while values are set or put back take effect afterwards.

    leftover: what a killed run had left behind, put back on entering.
    changes: what is changed: sysctl -> its old and new value.
    notes: what could not be had and is no error, in sentences.
    restored: what became of each change, after the end.
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
        self._pid = 0  # of the process to put things back; 0: nothing to be put back
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
            self._tell_failures(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore_surely()
        self._tell_failures(error)

    def _apply(self) -> None:
        self.changes, self.notes, self.restored = {}, [], []
        for name in self._evaluate():
            _check_writable(name, self._root)
        self._pid = os.getpid()
        # A second SIGINT may come before the first line of __exit__. Then this is what is left.
        atexit.register(self._restore_surely)
        self._file = StateFile(self._state_file or default_state_file())
        self._file.open(create=True)
        with self._file.locked():
            self.leftover = _restore_leftover(self._file, self._root)
            if failed := [one for one in self.leftover if one.outcome == "failed"]:
                raise TuningError(f"left behind by an earlier run: {failed[0]}")
            changes = _changes(self._evaluate(), self._root)
            # There without a change as well: no other run is to lower what this one relies on.
            self._is_written = True
            self._file.write(State(changes))
            self.changes = changes
        for name, change in changes.items():
            _set_and_verify(name, change.new, self._root)
        self._raise_descriptor_limit()
        # Where all descriptors are in use in the end, putting things back needs one.
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
                f"RLIMIT_NOFILE is raised to {before[1]} only, not to {needed}: "
                "this process may not raise its hard limit (CAP_SYS_RESOURCE, up to fs.nr_open)"
            )
            resource.setrlimit(resource.RLIMIT_NOFILE, after)
        self._limits = before, after

    def _restore_surely(self) -> None:
        interrupted: BaseException | None = None
        for _ in range(_ATTEMPTS):
            if self._pid != os.getpid():  # done; or a forked child, which has nothing to put back
                break
            try:
                with uninterrupted():
                    try:
                        self._restore()
                    finally:
                        self._pid = 0
            except BaseException as error:  # a signal's, before or after
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
                self.notes.append("RLIMIT_NOFILE has been set by somebody else, and is left alone")
        atexit.unregister(self._restore_surely)

    def _tell_failures(self, error: BaseException | None) -> None:
        failed = [str(one) for one in self.restored if one.outcome == "failed"]
        if not failed:
            return
        if error is None:
            raise TuningError("; ".join(failed))
        for one in failed:
            error.add_note(one)


def restore_leftover(state_file: Path | None = None, *, root: Path | None = None) -> list[Restored]:
    """Puts back what a run that was killed has left behind; nothing if there is none.

    The state file is removed, unless a value could not be put back (outcome ``failed``). One from
    before the last boot is removed, and nothing else done: the boot has put everything back.
    TuningError, and nothing is changed, if the run is still under way, or the file is not one to
    be trusted, or that of another network namespace.
    """
    try:
        file = StateFile(state_file or default_state_file())
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise TuningError(f"the network namespace cannot be told: {reason}") from error
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
    """Those that raise a value."""
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
    """The higher of two numbers, what takes in both of two ranges."""
    try:
        before, after = [*map(int, old.split())], [*map(int, new.split())]
    except ValueError:
        return new
    if len(before) == len(after) == 2:
        return f"{min(before[0], after[0])} {max(before[1], after[1])}"
    return old if len(before) == len(after) == 1 and before[0] >= after[0] else new


def _amount(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit

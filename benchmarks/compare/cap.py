"""A CPU quota for the servers, so that they are the limit and not the client: where both have one
CPU, a good server needs less of it than the client, and a rate says nothing of the server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kecho.system.cgroups import groups_of

__all__ = ["SHARE", "capped"]

SHARE = 0.5
# A server that has used its part stands still for the rest: short, beside a run of a second.
_PERIOD_US = 10_000
_NAME = "kecho-compare-"
_REMOVE_S = 1.0


@contextmanager
def capped(proc_self: Path = Path("/proc/self")) -> Iterator[Callable[[int], None]]:
    """A cgroup that gets SHARE of a CPU; yields what puts a process into it.

    OSError: there is no cgroup with the cpu controller in which this process may make another.
    """
    directory = _made(_parent(proc_self))
    try:
        yield lambda pid: _write(directory / "cgroup.procs", pid)
    finally:
        _remove(directory)


def _parent(proc_self: Path) -> Path:
    """cgroup v1: where this process is. v2: the root, as only a group without processes of its own,
    or the root, can have others that share its CPUs: cgroups(7)."""
    for group, mount_point in groups_of("cpu", proc_self):
        own = mount_point / group.strip("/")
        if (own / "cpu.cfs_quota_us").exists():
            return own
        with suppress(OSError):
            if "cpu" in (mount_point / "cgroup.subtree_control").read_text().split():
                return mount_point
    raise OSError("no cgroup has the cpu controller")


def _made(parent: Path) -> Path:
    for other in parent.glob(f"{_NAME}*"):
        if not Path("/proc", other.name.removeprefix(_NAME)).exists():
            with suppress(OSError):
                other.rmdir()
    directory = parent / f"{_NAME}{os.getpid()}"
    directory.mkdir()
    quota_us = int(_PERIOD_US * SHARE)
    try:
        if (parent / "cpu.cfs_quota_us").exists():
            _write(directory / "cpu.cfs_period_us", _PERIOD_US)
            _write(directory / "cpu.cfs_quota_us", quota_us)
        else:
            _write(directory / "cpu.max", f"{quota_us} {_PERIOD_US}")
    except OSError:
        _remove(directory)
        raise
    return directory


def _write(path: Path, value: object) -> None:
    path.write_text(f"{value}\n")


def _remove(directory: Path) -> None:
    """Those who were in it have ended, but the kernel may still be at it."""
    deadline = time.monotonic() + _REMOVE_S
    while True:
        try:
            directory.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        else:
            return

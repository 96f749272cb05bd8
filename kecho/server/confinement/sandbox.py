"""--sandbox: what a server that already listens will not need again is given up, by seccomp and
Landlock, before there is any other thread: those that it starts inherit it."""

from __future__ import annotations

import errno
import importlib
import os
import threading
from collections.abc import Callable

from ...system.directories import open_directory
from .. import _sandbox
from .._sandbox import IS_SANITIZED

__all__ = ["IS_SANITIZED", "enter", "prepare"]

# What Python, or a module of its library, imports or looks up when it is first needed: tracebacks,
# warnings, text that is escaped.
_NEEDED_LATER = (
    *("encodings.ascii", "encodings.unicode_escape"),
    *("linecache", "tokenize", "traceback"),
)

_ABSENT = {
    errno.ENOSYS: "this kernel has none",
    errno.EOPNOTSUPP: "it is switched off in this kernel",
    errno.EINVAL: "this kernel has none",
}


def prepare() -> None:
    """Loads what could not be loaded later: within the sandbox no file can be opened, and another
    user may have no right to where Python is installed."""
    for name in _NEEDED_LATER:
        importlib.import_module(name)
    _sandbox.load_unwinder()


def enter(*, socket_path: str | None, serves_udp: bool, engine: str) -> list[str]:
    """Confines this thread, and those that it starts; returns a reason for each part, seccomp or
    Landlock, that is not to be had here. The other one is in force all the same.

    socket_path: the file of a Unix socket, which may be removed.
    engine: who echoes; sockmap and io_uring take more calls than epoll.
    """
    if IS_SANITIZED:
        return ["this build has a sanitizer, which needs more than the sandbox gives"]
    if threading.active_count() > 1:
        return ["other threads run already, which would be outside"]
    _sandbox.set_no_new_privileges()
    reasons = [
        # In this order: the filter allows none of what it takes.
        _try("Landlock", lambda: _restrict_access(socket_path)),
        _try(
            "seccomp",
            lambda: _sandbox.filter_calls(
                for_a_file=socket_path is not None,
                for_datagrams=serves_udp,
                for_flows=engine == "sockmap",
                for_rings=engine == "io_uring",
            ),
        ),
    ]
    return [reason for reason in reasons if reason is not None]


def _restrict_access(socket_path: str | None) -> None:
    abi = _sandbox.landlock_abi()
    if socket_path is None:
        _sandbox.restrict_access(abi, -1)
        return
    directory = open_directory(os.path.dirname(socket_path))
    try:
        _sandbox.restrict_access(abi, directory.fd)
    finally:
        directory.close()


def _try(what: str, confine: Callable[[], None]) -> str | None:
    try:
        confine()
    except OSError as error:
        return f"no {what}: {_ABSENT.get(error.errno or 0, '')} ({error.strerror})"
    return None

"""A listening Unix socket and its file."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import ListenError, naming
from .options import is_abstract, uds_address

__all__ = ["SocketFile", "listen_unix"]

_LOCK_TRIES = 100
_LOCK_RETRY_S = 0.01


class SocketFile:
    """The file of a Unix socket that this process has bound.

    Holds it open (O_PATH), so that its inode's number cannot go to somebody else's file, which
    remove() would then take for ours.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    @property
    def itself(self) -> str:
        """A path that leads to it wherever it is now: proc_pid_fd(5)."""
        return f"/proc/self/fd/{self._fd}"

    def is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self.path))
        except OSError:
            return False

    def remove(self) -> None:
        if self.is_in_place():
            with suppress(OSError):
                os.unlink(self.path)
        self.forget()

    def forget(self) -> None:
        """Leaves the file where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def listen_unix(
    path: str, backlog: int, *, mode: int | None = None, owner: str | None = None
) -> tuple[socket.socket, SocketFile | None]:
    """The socket, and the file to remove in the end, which an abstract one has not.

    mode, owner: see the options uds_mode and uds_owner. Raises ListenError.
    """
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    file = None
    try:
        if is_abstract(path):
            one.bind(uds_address(path))
            one.listen(backlog)
        else:
            if mode is not None:
                os.fchmod(one.fileno(), mode)  # the file has no more than this, at no time
            with _locked(os.path.dirname(path) or "."):
                file = _bind(one, path)
                _own(file, mode, owner)
                one.listen(backlog)
    except BaseException as error:
        one.close()
        if file is not None:
            file.remove()
        if not isinstance(error, OSError) or isinstance(error, ListenError):
            raise
        reason = f"cannot listen on {path!r}: {error.strerror}"
        raise ListenError("uds", error.errno, reason) from None
    return one, file


def _bind(one: socket.socket, path: str) -> SocketFile:
    try:
        one.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale(path)
        one.bind(path)
    return SocketFile(path)


def _own(file: SocketFile, mode: int | None, owner: str | None) -> None:
    """Of this very file, and not of what somebody may have put in its place."""
    if owner is not None:
        from .privileges import find_owner

        try:
            ids = find_owner(owner)
        except ValueError as error:
            raise ListenError("uds_owner", None, str(error)) from None
        with naming("chown"):
            os.chown(file.itself, *ids)
    if mode is not None:
        with naming("chmod"):
            os.chmod(file.itself, mode)


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Keeps other kecho servers from replacing files in a directory at the same time.

    Between two servers that find the same stale file, the second would remove what the first
    has put in its place. Where the lock cannot be had within a second (somebody else's, or a
    file system without), things go on as if it could.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # bind will say what is wrong with it
        return
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_RETRY_S)
            except OSError:
                break
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Removes the file of a Unix socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ListenError("uds", errno.EADDRINUSE, f"{path!r} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        raise ListenError("uds", errno.EADDRINUSE, f"{path!r} is in use by another process")
    os.unlink(path)

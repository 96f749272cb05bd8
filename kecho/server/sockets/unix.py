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

from ...errors import ListenError, naming
from ...options import is_abstract, uds_address
from ...system.directories import Directory, open_directory
from ...system.users import find_owner

__all__ = ["SocketFile", "listen_unix", "refuse_descriptors", "takes_descriptors"]

_SO_PASSRIGHTS = 83  # <asm-generic/socket.h>, Linux 6.16
_BIND_TRIES = 3
_LOCK_TRIES = 100
_LOCK_RETRY_S = 0.01


class SocketFile:
    """The file of a Unix socket that this process has bound, in a directory that it owns from now
    on and closes.

    Holds it open (O_PATH), so that its inode's number cannot go to somebody else's file, which
    remove() would then take for ours.
    """

    def __init__(self, directory: Directory, name: str) -> None:
        self._directory, self._name = directory, name
        self._fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)

    @property
    def itself(self) -> str:
        """A path that leads to it wherever it is now: proc_pid_fd(5)."""
        return f"/proc/self/fd/{self._fd}"

    @property
    def status(self) -> os.stat_result:
        return os.fstat(self._fd)

    def remove(self) -> None:
        """In its directory, wherever that is now, unless another file is in its place there."""
        if self._fd >= 0:
            with suppress(OSError):
                self._directory.remove(self._name, self.status)
        self.forget()

    def forget(self) -> None:
        """Leaves the file where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._directory.close()
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
        refuse_descriptors(one)
        if is_abstract(path):
            one.bind(uds_address(path))
            one.listen(backlog)
        else:
            if mode is not None:
                os.fchmod(one.fileno(), mode)  # the file has no more than this, at no time
            directory = open_directory(os.path.dirname(path))
            try:
                with _locked(directory):
                    file = _bind(one, directory, path)
                    _own(file, mode, owner)
                    one.listen(backlog)
            finally:
                if file is None:
                    directory.close()
    except BaseException as error:
        one.close()
        if file is not None:
            file.remove()
        if not isinstance(error, OSError) or isinstance(error, ListenError):
            raise
        reason = f"cannot listen on {path!r}: {error.strerror or error}"
        raise ListenError("uds", error.errno, reason) from None
    return one, file


def refuse_descriptors(one: socket.socket) -> bool:
    """Has clients that connect from now on get EPERM when they pass a descriptor. False: the kernel
    does not know how.

    An echo takes none, but the kernel closes what comes, on the thread that receives; that waits as
    long as the sender has asked a TCP socket to linger, which no signal here ends: socket(7)
    SO_LINGER, __scm_destroy() and unix_may_passrights() in net.
    """
    try:
        one.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return False
    return True


def takes_descriptors(one: socket.socket) -> bool:
    """Whether clients may pass some."""
    try:
        return one.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS) != 0
    except OSError:
        return True


def _bind(one: socket.socket, directory: Directory, path: str) -> SocketFile:
    """What stands in the way is removed if it is the file of a socket that is no more."""
    name = os.path.basename(path)
    if name in ("", ".", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    for _ in range(_BIND_TRIES):
        # Held before bind(2): that waits for the directory's lock, under which another bind(2)
        # makes its file and has the socket found by it. So the held file's socket can be found now.
        held_fd = directory.hold(name)
        try:
            one.bind(directory.path_of(name))
            return SocketFile(directory, name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if held_fd is not None:
                facts = os.fstat(held_fd)
                _check_stale(directory, facts, path)
                directory.remove(name, facts)
        finally:
            if held_fd is not None:
                os.close(held_fd)
    raise ListenError("uds", errno.EADDRINUSE, f"{path!r} is made anew by another process")


def _check_stale(directory: Directory, facts: os.stat_result, path: str) -> None:
    """ListenError unless this is the file of a Unix socket that no process has any more.

    To connect a datagram socket tells, and does nothing to whoever is there: it is refused
    (ECONNREFUSED) only if no socket, of whatever kind and in whatever network namespace, is bound
    to the file. A stream socket that does not listen yet refuses streams in the same way, and has
    EPROTOTYPE for datagrams: unix_find_bsd() in net/unix/af_unix.c.
    """
    if not stat.S_ISSOCK(facts.st_mode):
        raise ListenError("uds", errno.EADDRINUSE, f"{path!r} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(directory.path_of(os.path.basename(path)))
    if refused != errno.ECONNREFUSED:
        raise ListenError("uds", errno.EADDRINUSE, f"{path!r} is in use by another process")


def _own(file: SocketFile, mode: int | None, owner: str | None) -> None:
    """Of this very file, and not of what somebody may have put in its place."""
    if mode is None and owner is None:
        return
    if not stat.S_ISSOCK(file.status.st_mode) or file.status.st_nlink != 1:
        raise ListenError("uds", errno.EEXIST, "its file has been replaced by another process")
    if owner is not None:
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
def _locked(directory: Directory) -> Iterator[None]:
    """Keeps other kecho servers from replacing files in a directory at the same time.

    Between two servers that find the same stale file, the second would remove what the first
    has put in its place. Where the lock cannot be had within a second (somebody else's, or a
    file system without), things go on as if it could.
    """
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
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

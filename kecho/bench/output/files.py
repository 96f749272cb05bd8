"""Reading and writing files of results. A file is written as a whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...system.directories import Directory, check_link, open_directory
from ...system.files import open_checked

__all__ = ["check_writable", "descriptor_of", "read_bounded", "reason_of", "write_whole"]

_STREAMS = {"-": 1, "/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def check_writable(path: str) -> None:
    """Raise what write_whole() would raise, as far as that can be known in advance."""
    if (own_fd := descriptor_of(path)) is not None:
        if fcntl.fcntl(own_fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return
    with _place_of(path) as place:
        if place.is_special:
            _check_special(place)
            return
        with _new_file(place) as (fd, _):
            os.close(fd)


def write_whole(path: str, content: str | bytes) -> None:
    """Write a file, as UTF-8 if the content is text. Raise OSError if that fails.

    A regular file is replaced by one of the same owner and mode, or stays as it was. A special
    file, such as a pipe, is written to, and so is an open descriptor (/dev/stdout, /dev/fd/N). A
    symbolic link is followed once, if only root or the caller could have put it there.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    if (own_fd := descriptor_of(path)) is not None:
        _write(os.dup(own_fd), data)
        return
    with _place_of(path) as place:
        if place.is_special:
            _check_special(place)
            _write(_open_special(place), data)
            return
        with _new_file(place) as (fd, name):
            _write(fd, data, lasting=True)
            place.directory.rename(name, place.name)


def read_bounded(path: str, most: int) -> bytes:
    """Read all of a regular file, or of an open descriptor (/dev/stdin, /dev/fd/N; - is stdin).

    Raises OSError if that fails, ValueError if there are more than `most` bytes. Other kinds of
    files are not opened: a device may never end, and a pipe may wait for a writer.
    """
    own_fd = 0 if path == "-" else descriptor_of(path)
    fd = os.dup(own_fd) if own_fd is not None else open_checked(path, _check_regular)
    with open(fd, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    return data


def _check_regular(status: os.stat_result) -> None:
    """Raise ValueError or OSError unless it is a regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file; a pipe is read as standard input, -")


def descriptor_of(path: str) -> int | None:
    """Return the open descriptor of this process that a path names; None if it names none.

    - is stdout.
    """
    if path in _STREAMS:
        return _STREAMS[path]
    # By its text alone: anyone can make a link to /proc/self/fd/7, for instance in /dev/shm.
    found = re.fullmatch(r"/(?:dev/fd|proc/(?:self|thread-self|([0-9]+))/fd)/([0-9]{1,9})", path)
    if found is None or found[1] not in (None, str(os.getpid())):
        return None
    return int(found[2])


def reason_of(error: OSError | ValueError) -> str:
    """Return the reason of an error, without the name of the file."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@dataclass(frozen=True)
class _Place:
    """A file by its directory and name. status: None if there is no file."""

    directory: Directory
    name: str
    status: os.stat_result | None

    @property
    def is_special(self) -> bool:
        """Whether there is a file that is not a regular one."""
        return self.status is not None and not stat.S_ISREG(self.status.st_mode)


@contextmanager
def _place_of(path: str) -> Iterator[_Place]:
    """Find the place of a file. kecho.system.directories says which links are followed."""
    place = _look_up(path, None)
    try:
        if place.status is not None and stat.S_ISLNK(place.status.st_mode):
            check_link(place.status, os.fstat(place.directory.fd))
            link, target = place, os.readlink(place.name, dir_fd=place.directory.fd)
            place = _look_up(target, link.directory.fd)
            link.directory.close()
            if place.status is not None and stat.S_ISLNK(place.status.st_mode):
                raise OSError(errno.ELOOP, "a link to a link, which is not followed")
        if place.status is not None and stat.S_ISDIR(place.status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield place
    finally:
        place.directory.close()


def _look_up(path: str, below: int | None) -> _Place:
    """Open the directory of a file. below: a directory that a relative path starts from."""
    way, name = os.path.split(path)
    if name in ("", ".", ".."):
        way, name = path, "."  # a directory, which the caller refuses
    directory = open_directory(way, below)
    try:
        return _Place(directory, name, directory.status(name))
    except BaseException:
        directory.close()
        raise


def _check_special(place: _Place) -> None:
    """Raise OSError if a special file, such as a pipe, must not be written to."""
    assert place.status is not None
    here = os.fstat(place.directory.fd)
    # The same rule as the kernel's fs.protected_fifos, which applies only to calls that may create.
    if here.st_mode & stat.S_IWOTH and place.status.st_uid not in (0, os.geteuid(), here.st_uid):
        raise PermissionError(
            errno.EACCES,
            "belongs to another user, in a directory that anyone may write to: not written",
        )
    if not os.access(place.name, os.W_OK, dir_fd=place.directory.fd):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _open_special(place: _Place) -> int:
    """Open a special file for writing, if it is still the one that was checked."""
    assert place.status is not None
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(place.name, flags, dir_fd=place.directory.fd)
    if not os.path.samestat(os.fstat(fd), place.status):
        os.close(fd)
        raise FileExistsError(errno.EEXIST, "another file has just taken its place")
    return fd


@contextmanager
def _new_file(place: _Place) -> Iterator[tuple[int, str]]:
    """Make a new file in the same directory, to be renamed.

    Gives its descriptor, which the caller closes, and its name.
    """
    with place.directory.new_file(0o666 if place.status is None else 0o600) as (fd, name):
        if place.status is not None:
            try:
                _take_after(fd, place.status)
            except BaseException:
                os.close(fd)
                raise
        yield fd, name


def _take_after(fd: int, status: os.stat_result) -> None:
    """Give a new file the owner and mode of the file that it will replace."""
    now = os.fstat(fd)
    try:
        if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(fd, status.st_uid, status.st_gid)
    except PermissionError:
        raise PermissionError(
            errno.EPERM,
            "belongs to another user or group, and would change its owner; remove it first",
        ) from None
    os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o777)


def _write(fd: int, data: bytes, *, lasting: bool = False) -> None:
    """Write all of the data and close the descriptor. lasting: wait until it is on the disk."""
    with open(fd, "wb", buffering=0) as out:
        left = memoryview(data)
        while left:
            written = out.write(left)
            if written is None:  # another process has made it non-blocking
                select.select([], [fd], [])
            left = left[written or 0 :]
        if lasting:
            os.fsync(fd)

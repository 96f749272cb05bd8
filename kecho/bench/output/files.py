"""Files of results: whole or not at all, in the place that was named and no other."""

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

__all__ = ["check_writable", "descriptor_of", "read_bounded", "reason_of", "write_whole"]

_STREAMS = {"-": 1, "/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def check_writable(path: str) -> None:
    """Raises what write_whole() would, as far as that can be told before."""
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
    """Writes a file, as UTF-8 if it is text. OSError if that cannot be done.

    A regular file is replaced by one of the same owner and mode, or stays as it was. What is none,
    such as a pipe, is written to, and so is an open descriptor (/dev/stdout, /dev/fd/N). A symbolic
    link is followed once, if nobody but root or the caller could have put it there.
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
    """All of a regular file, or of what an open descriptor (/dev/stdin, /dev/fd/N; - is stdin)
    gives. OSError, or ValueError if there are more than `most` bytes.

    Nothing else is opened by its name: a device may never end, and a pipe may wait for a writer.
    """
    own_fd = 0 if path == "-" else descriptor_of(path)
    if own_fd is not None:
        fd = os.dup(own_fd)
    else:
        _check_regular(os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if own_fd is None:
            _check_regular(os.fstat(fd))
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    return data


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file; a pipe is read as standard input, -")


def descriptor_of(path: str) -> int | None:
    """The open descriptor of this process that a path names, None if it names none; - is stdout."""
    if path in _STREAMS:
        return _STREAMS[path]
    # By its text alone: in /dev/shm anybody may make a link to /proc/self/fd/7.
    found = re.fullmatch(r"/(?:dev/fd|proc/(?:self|thread-self|([0-9]+))/fd)/([0-9]{1,9})", path)
    if found is None or found[1] not in (None, str(os.getpid())):
        return None
    return int(found[2])


def reason_of(error: OSError | ValueError) -> str:
    """The reason alone. The caller puts the file's name in front of it."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@dataclass(frozen=True)
class _Place:
    """directory: that holds the file. status: None where there is no file."""

    directory: Directory
    name: str
    status: os.stat_result | None

    @property
    def is_special(self) -> bool:
        return self.status is not None and not stat.S_ISREG(self.status.st_mode)


@contextmanager
def _place_of(path: str) -> Iterator[_Place]:
    """Where the file is: kecho.system.directories says which links on the way are followed."""
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
    way, name = os.path.split(path)
    if name in ("", ".", ".."):
        way, name = path, "."  # a directory, which is told below
    directory = open_directory(way, below)
    try:
        return _Place(directory, name, directory.status(name))
    except BaseException:
        directory.close()
        raise


def _check_special(place: _Place) -> None:
    """OSError if what is no regular file, such as a pipe, is not to be written to."""
    assert place.status is not None
    here = os.fstat(place.directory.fd)
    # As the kernel's fs.protected_fifos, which only looks at calls that may make the file.
    if here.st_mode & stat.S_IWOTH and place.status.st_uid not in (0, os.geteuid(), here.st_uid):
        raise PermissionError(
            errno.EACCES,
            "belongs to another user, in a directory that all may write: not written to",
        )
    if not os.access(place.name, os.W_OK, dir_fd=place.directory.fd):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _open_special(place: _Place) -> int:
    assert place.status is not None
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(place.name, flags, dir_fd=place.directory.fd)
    if not os.path.samestat(os.fstat(fd), place.status):
        os.close(fd)
        raise FileExistsError(errno.EEXIST, "somebody has just put another file in its place")
    return fd


@contextmanager
def _new_file(place: _Place) -> Iterator[tuple[int, str]]:
    """A new file beside the place, to be renamed: descriptor, which is to be closed, and name."""
    with place.directory.new_file(0o666 if place.status is None else 0o600) as (fd, name):
        if place.status is not None:
            try:
                _take_after(fd, place.status)
            except BaseException:
                os.close(fd)
                raise
        yield fd, name


def _take_after(fd: int, status: os.stat_result) -> None:
    """Owner and mode of the file that it is to replace."""
    now = os.fstat(fd)
    try:
        if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(fd, status.st_uid, status.st_gid)
    except PermissionError:
        raise PermissionError(
            errno.EPERM, "belongs to another user or group, who would lose it; remove it first"
        ) from None
    os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o777)


def _write(fd: int, data: bytes, *, lasting: bool = False) -> None:
    with open(fd, "wb", buffering=0) as out:
        left = memoryview(data)
        while left:
            written = out.write(left)
            if written is None:  # somebody has made it non-blocking
                select.select([], [fd], [])
            left = left[written or 0 :]
        if lasting:
            os.fsync(fd)

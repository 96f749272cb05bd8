"""Files of results: whole or not at all, in the place that was named and no other."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

__all__ = ["check_writable", "descriptor_of", "reason_of", "write_whole"]

_NO_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_writable(path: str) -> None:
    """Raises what write_whole() would, as far as that can be told before."""
    if (own_fd := descriptor_of(path)) is not None:
        if fcntl.fcntl(own_fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return
    with _place_of(path) as place:
        if place.is_special:
            if not os.access(place.name, os.W_OK, dir_fd=place.directory_fd):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        with _temporary(place) as (fd, _):
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
            flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
            _write(os.open(place.name, flags, dir_fd=place.directory_fd), data)
            return
        with _temporary(place) as (fd, name):
            _write(fd, data, lasting=True)
            os.rename(
                name, place.name, src_dir_fd=place.directory_fd, dst_dir_fd=place.directory_fd
            )


def descriptor_of(path: str) -> int | None:
    """The open descriptor of this process that a path names, None if it names none; - is stdout."""
    if path == "-":
        return 1
    if not path.startswith(("/dev/", "/proc/")):
        return None
    for _ in range(3):  # /dev/stdout -> /proc/self/fd/1
        directory, name = os.path.split(path)
        if name.isdecimal() and os.path.realpath(directory) == f"/proc/{os.getpid()}/fd":
            return int(name)
        try:
            path = os.path.join(directory, os.readlink(path))
        except OSError:
            return None
    return None


def reason_of(error: OSError | ValueError) -> str:
    """The reason alone. The caller puts the file's name in front of it."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@dataclass(frozen=True)
class _Place:
    """directory_fd: of the directory that holds the file. status: None where there is no file."""

    directory_fd: int
    name: str
    status: os.stat_result | None

    @property
    def is_special(self) -> bool:
        return self.status is not None and not stat.S_ISREG(self.status.st_mode)


@contextmanager
def _place_of(path: str) -> Iterator[_Place]:
    """Where the file is; directories on the way are found as the kernel finds them."""
    place = _look_up(path, None)
    try:
        if place.status is not None and stat.S_ISLNK(place.status.st_mode):
            _check_link(place.status, os.fstat(place.directory_fd))
            link, target = place, os.readlink(place.name, dir_fd=place.directory_fd)
            place = _look_up(target, link.directory_fd)
            os.close(link.directory_fd)
            if place.status is not None and stat.S_ISLNK(place.status.st_mode):
                raise OSError(errno.ELOOP, "a link to a link, which is not followed")
        if place.status is not None and stat.S_ISDIR(place.status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield place
    finally:
        os.close(place.directory_fd)


def _look_up(path: str, directory_fd: int | None) -> _Place:
    directory, name = os.path.split(path)
    if name in ("", ".", ".."):
        directory, name = path, "."  # a directory, which is told below
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(directory or ".", flags | os.O_PATH, dir_fd=directory_fd)
    try:
        return _Place(fd, name, os.stat(name, dir_fd=fd, follow_symlinks=False))
    except FileNotFoundError:
        return _Place(fd, name, None)
    except BaseException:
        os.close(fd)
        raise


def _check_link(link: os.stat_result, directory: os.stat_result) -> None:
    """OSError if somebody else could have said where it leads, and have root overwrite that."""
    trusted = (0, os.geteuid())
    if link.st_uid not in trusted:
        raise OSError(errno.ELOOP, "a link of another user, which is not followed")
    if directory.st_uid not in trusted or directory.st_mode & _NO_OTHERS:
        raise OSError(
            errno.ELOOP, "a link in a directory that others may write, which is not followed"
        )


@contextmanager
def _temporary(place: _Place) -> Iterator[tuple[int, str]]:
    """A new file beside the place, to be renamed: descriptor, which is to be closed, and name."""
    name = f".kecho-{secrets.token_hex(8)}.tmp"
    mode = 0o666 if place.status is None else 0o600
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, mode, dir_fd=place.directory_fd)
    try:
        if place.status is not None:
            try:
                _take_after(fd, place.status)
            except BaseException:
                os.close(fd)
                raise
        yield fd, name
    finally:
        with suppress(FileNotFoundError):  # it has been renamed
            os.unlink(name, dir_fd=place.directory_fd)


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

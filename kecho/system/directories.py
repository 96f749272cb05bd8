"""Directories held open, and the one way in which files in them are made, replaced and removed.

Whoever may write to a directory on the way to a file could put a symbolic link there, or exchange
the directory, between two system calls that take a path. So open_directory() looks the way up once,
and all else goes through the descriptor that it returns: openat(2), renameat(2), unlinkat(2).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

__all__ = ["NO_OTHERS", "Directory", "check_link", "open_directory"]

NO_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_WAY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS_MOST = 40  # on one way, as for the kernel: path_resolution(7)


@dataclass(frozen=True)
class Directory:
    """One that stays the same, whatever becomes of its path. No name given to it is followed.

    path: as it was given.
    is_steady: nobody but root and this process's user can have the path lead elsewhere.
    """

    fd: int
    path: str = "."
    is_steady: bool = False

    def close(self) -> None:
        os.close(self.fd)

    def status(self, name: str) -> os.stat_result | None:
        """None: there is no such file."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def hold(self, name: str) -> int | None:
        """A descriptor (O_PATH) that keeps the inode's number from another file; None: no file."""
        try:
            return os.open(name, _WAY, dir_fd=self.fd)
        except FileNotFoundError:
            return None

    @contextmanager
    def new_file(self, mode: int = 0o600, name: str | None = None) -> Iterator[tuple[int, str]]:
        """A new file, open for writing: descriptor, which is to be closed, and name. It is removed
        in the end, unless it has been renamed.

        name: by default one that nobody can foresee. FileExistsError if there is such a file.
        """
        name = name or f".kecho-{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, mode, dir_fd=self.fd)
        try:
            yield fd, name
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)

    def make(self, name: str, mode: int) -> None:
        """A directory in it. There may be one already, whosoever that is."""
        with suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=self.fd)

    def rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str, only: os.stat_result | None = None) -> bool:
        """Whether there was such a file; with `only`, one of this inode, and otherwise it stays.

        No call removes by inode. Whoever may rename files in this directory can put another of its
        files in the place between the look and the removal.
        """
        found = self.status(name)
        if found is None or (only is not None and not os.path.samestat(found, only)):
            return False
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def path_of(self, name: str) -> str:
        """For a call that takes no descriptor, such as bind(2); it leads into this directory.

        OSError if it takes /proc, proc_pid_fd(5), and that is not mounted.
        """
        if self.is_steady:
            return os.path.join(self.path, name)
        if not os.path.exists(f"/proc/self/fd/{self.fd}"):
            raise OSError(
                errno.ENOENT, "others could exchange its directory, and /proc is not mounted"
            )
        return f"/proc/self/fd/{self.fd}/{name}"


def open_directory(path: str, below: int | None = None) -> Directory:
    """The directory, which the caller closes. Its descriptor is O_PATH: it need not be readable.

    below: the descriptor of the directory that a relative path begins in.

    A symbolic link on the way is followed if it and its directory belong to root or the caller, or
    to the owner of "/".
    Links in /proc are followed as the kernel does. Raises OSError.
    """
    fd = os.open("/" if path.startswith("/") else ".", _WAY | os.O_DIRECTORY, dir_fd=below)
    left = path.split("/")[::-1]
    is_steady, links = True, 0
    try:
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            here = os.fstat(fd)
            try:
                following = os.open(name, _WAY | os.O_DIRECTORY, dir_fd=fd)
            except NotADirectoryError:
                links += 1
                following, more = _follow(fd, name, here)
                left += more
                if links > _LINKS_MOST:
                    os.close(following)
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
                is_steady &= not more or _is_fixed(here, None)
            else:
                is_steady &= name != ".." and _is_fixed(here, os.fstat(following))
            os.close(fd)
            fd = following
    except BaseException:
        os.close(fd)
        raise
    return Directory(fd, path, is_steady and below is None)


def _follow(fd: int, name: str, here: os.stat_result) -> tuple[int, list[str]]:
    """Where a link leads: a descriptor, and the rest of the way from there, the last part first."""
    link_fd = os.open(name, _WAY, dir_fd=fd)
    try:
        status = os.fstat(link_fd)
        if not stat.S_ISLNK(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        check_link(status, here, on_the_way=name)
        if _is_of_proc(here):  # such as /proc/self/cwd, whose text need not be a path that works
            return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd), []
        target = os.readlink("", dir_fd=link_fd)
    finally:
        os.close(link_fd)
    start = "/" if target.startswith("/") else "."
    return os.open(start, _WAY | os.O_DIRECTORY, dir_fd=fd), target.split("/")[::-1]


def check_link(
    link: os.stat_result, directory: os.stat_result, *, on_the_way: str | None = None
) -> None:
    """OSError if somebody else could have said where it leads, and have root write there.

    on_the_way: its name, if a directory is looked for; then its owner is enough to trust it where
    others may write as well, as they could not have made it.
    """
    what = "a link" if on_the_way is None else f"{on_the_way!r} on the way is a link"
    if link.st_uid not in _trusted():
        raise OSError(errno.ELOOP, f"{what} of another user, which is not followed")
    others = on_the_way is None and directory.st_mode & NO_OTHERS
    if directory.st_uid not in _trusted() or others:
        raise OSError(
            errno.ELOOP, f"{what} in a directory that others may write, which is not followed"
        )


def _trusted() -> tuple[int, ...]:
    """Root and the caller; and whoever owns "/", on which every path depends: in a user namespace,
    the root outside of it shows as the overflow user, user_namespaces(7)."""
    return 0, os.geteuid(), os.stat("/").st_uid


def _is_fixed(directory: os.stat_result, entry: os.stat_result | None) -> bool:
    """Whether nobody else may put another file in the place of this entry (None: unknown)."""
    if directory.st_uid not in _trusted():
        return False
    if not directory.st_mode & NO_OTHERS:
        return True
    is_sticky = bool(directory.st_mode & stat.S_ISVTX)
    return is_sticky and entry is not None and entry.st_uid in _trusted()


def _is_of_proc(status: os.stat_result) -> bool:
    try:
        return status.st_dev == os.stat("/proc/self/").st_dev
    except OSError:  # it is not mounted
        return False

"""Network namespaces by name, path or process: ip-netns(8), namespaces(7)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from ..system.files import open_checked
from .process import PID_MOST, Unseen, raise_unseen

__all__ = ["as_found", "check_namespace", "open_namespace"]

DIRECTORY = Path("/run/netns")
NS_GET_NSTYPE, CLONE_NEWNET = 0xB703, 0x40000000  # ioctl_ns(2), Linux 4.11
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_namespace(text: str) -> str:
    """The text, if it is a name, a path (with a "/" in it), a PID or pid:N. Raises ValueError."""
    if not text or "\0" in text or text in (".", "..") or len(text) > 4095:
        raise ValueError(f"{text[:60]!r} is not the name of a network namespace")
    if text.startswith("pid:") and _pid(text[4:]) is None:
        raise ValueError(f"{text[:60]!r} is not pid: and the number of a process")
    return text


def _pid(text: str) -> int | None:
    is_number = text.isascii() and text.isdigit() and len(text) <= 7
    return int(text) if is_number and 0 < int(text) <= PID_MOST else None


def as_found(text: str) -> str:
    """The same namespace by a path or as pid:N, so that a number is not a name today and a process
    tomorrow."""
    if text.startswith("pid:") or "/" in text:
        return text
    path = DIRECTORY / text
    return f"pid:{text}" if _pid(text) is not None and not path.exists() else str(path)


def open_namespace(text: str) -> int:
    """A descriptor of the network namespace, which the caller closes.

    text: as of check_namespace(); a number is a name first, and a PID if there is no such name.
    Raises OSError whose text says what is wrong: Unseen if it may not be seen, FileNotFoundError or
    ProcessLookupError if it is not there, EINVAL if it is something else.
    """
    check_namespace(text)
    if text.startswith("pid:"):
        return _open_of_process(int(text[4:]))
    if "/" in text:
        return _open(text, f"there is no {text!r}")
    absent = f"there is no network namespace {text!r} in {DIRECTORY}"
    pid = _pid(text)
    if pid is None:
        return _open(f"{DIRECTORY}/{text}", absent)
    try:
        return _open(f"{DIRECTORY}/{text}", absent)
    except FileNotFoundError:
        try:
            return _open_of_process(pid)
        except ProcessLookupError as error:
            raise FileNotFoundError(errno.ENOENT, f"{absent}, and {error.strerror}") from None


def _open_of_process(pid: int) -> int:
    try:
        return _open(f"/proc/{pid}/ns/net", "")
    except FileNotFoundError:
        raise_unseen(pid)


def _open(path: str, absent: str) -> int:
    def check(status: os.stat_result) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"{path!r} is {KINDS[kind]}, not a network namespace")

    try:
        fd = open_checked(path, check)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, absent) from None
    except PermissionError:
        raise Unseen(errno.EACCES, f"{path!r} may not be opened: use sudo") from None
    try:
        if fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET:
            return fd
        what = "a namespace of another kind"
    except OSError:
        what = "a file"  # as an `ip netns add` leaves behind whose mount is gone
    os.close(fd)
    raise OSError(errno.EINVAL, f"{path!r} is {what}, not a network namespace")

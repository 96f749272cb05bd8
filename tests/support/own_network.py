"""A network namespace for this process alone: its own loopback, ports, sysctls and counters.

As a program it enters a namespace and then runs Python with its own arguments:
`python own_network.py -c 'print()'` is `python -c 'print()'` in a namespace. pytest-xdist starts
its workers this way, because a process that has threads cannot enter a user namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys

CLONE_NEWNET = 0x40000000
CLONE_NEWUSER = 0x10000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
LIBC = ctypes.CDLL(None, use_errno=True)

_entered = False


def checked(result: int) -> None:
    """Raises OSError for the result of a failed call of the C library."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter() -> None:
    """Enters a new network namespace whose loopback is up; OSError where that is refused.

    Root keeps its capabilities. An ordinary user enters a user namespace as well,
    user_namespaces(7), and drops the capabilities which that gives: the tests run unprivileged.
    """
    global _entered
    try:
        checked(LIBC.unshare(CLONE_NEWNET))
    except PermissionError:
        if os.geteuid() == 0:  # without CAP_SYS_ADMIN, as in a container
            raise
        _enter_as_ordinary_user()
    else:
        _set_loopback_up()
    _entered = True


def _enter_as_ordinary_user() -> None:
    enter_with_users(os.geteuid(), os.getegid())
    _drop_capabilities()


def enter_with_users(uid: int, gid: int) -> None:
    """Enters a network namespace and a user namespace that owns it, in which this user, who needs
    no privilege, is `uid` and has every capability. OSError where that is refused."""
    maps = f"{uid} {os.geteuid()} 1", f"{gid} {os.getegid()} 1"
    checked(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET))
    for name, text in zip(("setgroups", "uid_map", "gid_map"), ("deny", *maps), strict=True):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _set_loopback_up()


def _set_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))


def _drop_capabilities() -> None:
    """All sets of this thread: capset(2), version 3."""
    header = struct.pack("Ii", 0x20080522, 0)
    checked(LIBC.capset(header, bytes(24)))


def is_entered() -> bool:
    """Whether enter() has succeeded in this process."""
    return _entered


def can_be_entered() -> bool:
    """Tries it in a process of its own."""
    return subprocess.run([sys.executable, __file__, "-c", ""], capture_output=True).returncode == 0


if __name__ == "__main__":
    enter()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])

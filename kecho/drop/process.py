"""Which process holds a socket: proc_pid_fd(5)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from .devices import as_name

__all__ = ["Holder", "holders", "inodes_of"]


class Holder(NamedTuple):
    pid: int
    name: str


def inodes_of(pid: int) -> set[int]:
    """The sockets that a process holds. Raises OSError: no such process, or no permission."""
    found = set()
    directory = f"/proc/{pid}/fd"
    for entry in os.listdir(directory):
        try:
            target = os.readlink(f"{directory}/{entry}")
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found


def holders(inodes: Iterable[int]) -> dict[int, Holder]:
    """inode -> the first process that holds it, of those whose descriptors we may read."""
    wanted = set(inodes) - {0}
    found: dict[int, Holder] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if len(found) == len(wanted):
            break
        try:
            held = inodes_of(pid) & wanted
            if held:
                with open(f"/proc/{pid}/comm", "rb") as file:
                    name = as_name(file.read().removesuffix(b"\n"))
                for inode in held:
                    found.setdefault(inode, Holder(pid, name))
        except OSError:
            continue  # ended meanwhile, or somebody else's
    return found

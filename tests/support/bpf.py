"""The records of a server's flows in the kernel: `struct kecho_flow` of ext/common/flows.h, to be
read and changed from outside, for what no client can bring about."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Self

BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM, BPF_MAP_GET_NEXT_KEY = 1, 2, 4
BPF_MAP_TYPE_HASH = 1
BPF_GET_FD_BY_ID = {"prog": 13, "map": 14}  # needs CAP_SYS_ADMIN
SYS_PIDFD_GETFD = 438
SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), -1)
LIBC = ctypes.CDLL(None, use_errno=True)
ECHOED = 0


class Flow(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("token", "redirected", "passed", "mark")),
        *((name, ctypes.c_uint32) for name in ("charge_before", "charge", "mode", "is_told")),
        *((name, ctypes.c_uint32) for name in ("first", "trim")),
    )


class Element(ctypes.Structure):
    """Of `union bpf_attr`."""

    _fields_ = (
        ("map_fd", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("key", "value")),
        ("flags", ctypes.c_uint64),
    )


def _call(number: int, *arguments: object) -> int:
    result: int = LIBC.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def bpf_objects(pid: int | str) -> set[tuple[str, int]]:
    """The maps and programs that a process has open: ("map" or "prog", id) of each."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError):
            about = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
            for kind, number in re.findall(r"^(map|prog)_id:\t(\d+)$", about, re.MULTILINE):
                found.add((kind, int(number)))
    return found


def is_in_the_kernel(kind: str, number: int) -> bool:
    """Whether there is such a map or program, of whatever process."""
    wanted = (ctypes.c_uint32 * 3)(number)
    try:
        os.close(_call(SYS_BPF, BPF_GET_FD_BY_ID[kind], wanted, ctypes.sizeof(wanted)))
    except FileNotFoundError:
        return False
    return True


class FlowRecords:
    """Of a server's process, by a descriptor of their map; for `with`."""

    def __init__(self, pid: int) -> None:
        (number,) = (
            int(info.name)
            for info in Path(f"/proc/{pid}/fdinfo").iterdir()
            if re.search(rf"^map_type:\t{BPF_MAP_TYPE_HASH}$", info.read_text(), re.MULTILINE)
        )
        process = os.pidfd_open(pid)
        try:
            self.fd = _call(SYS_PIDFD_GETFD, process, number, 0)
        finally:
            os.close(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def _element(self, command: int, key: ctypes.c_uint64 | None, value: object) -> None:
        element = Element(map_fd=self.fd, value=ctypes.addressof(value))  # type: ignore[arg-type]
        element.key = None if key is None else ctypes.addressof(key)
        _call(SYS_BPF, command, ctypes.byref(element), ctypes.sizeof(element))

    def keys(self) -> set[int]:
        """Cookies of the server's sockets."""
        found: set[int] = set()
        key, following = None, ctypes.c_uint64()
        while True:
            try:
                self._element(BPF_MAP_GET_NEXT_KEY, key, following)
            except FileNotFoundError:
                return found
            found.add(following.value)
            key = ctypes.c_uint64(following.value)

    def read(self, key: int) -> Flow:
        flow = Flow()
        self._element(BPF_MAP_LOOKUP_ELEM, ctypes.c_uint64(key), flow)
        return flow

    def write(self, key: int, flow: Flow) -> None:
        self._element(BPF_MAP_UPDATE_ELEM, ctypes.c_uint64(key), flow)

    def lose_a_byte(self, key: int) -> Flow:
        """Has the flow's next byte come as if the one before it were missing."""
        flow = self.read(key)
        flow.first -= 1
        self.write(key, flow)
        return flow

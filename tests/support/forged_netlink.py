"""An attacker on netlink: an ordinary user, who is root only of namespaces that he made himself.

CAP_NET_ADMIN over a network namespace is enough to send to any netlink socket in it, whoever has
opened that; which there are is in /proc/net/netlink.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from support.clients import DEADLINE_S
from support.connections_to_drop import Ends, become_nobody
from support.own_network import LIBC, enter_with_users

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLMSG_ERROR, NLMSG_DONE = 4, 20, 2, 3
PR_SET_DUMPABLE = 4
SEQUENCES = range(1, 400)
CONNECTIONS = 50
REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EUSERS)


def message(kind: int, sequence: int, port_id: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, port_id) + payload


def forged_socket(number: int) -> bytes:
    """struct inet_diag_msg of one that is not there."""
    ends = struct.pack("!HH4s12x4s12x", 1 + number, 666, b"\xc0\0\2\1", b"\xc0\0\2\2")
    return bytes([socket.AF_INET, 1, 0, 0]) + ends + struct.pack("=IQ5I", 0, number, 0, 0, 0, 0, 0)


def forged(kind: str, port_id: int) -> bytes:
    """A datagram for whoever has asked with one of the SEQUENCES."""
    made = {
        "done": lambda number: message(NLMSG_DONE, number, port_id, bytes(4)),
        "sockets": lambda number: message(
            SOCK_DIAG_BY_FAMILY, number, port_id, forged_socket(number)
        ),
        "errors": lambda number: message(
            NLMSG_ERROR, number, port_id, struct.pack("=i", -errno.EBADMSG) + bytes(16)
        ),
        "acks": lambda number: message(NLMSG_ERROR, number, port_id, bytes(20)),
    }
    if kind == "garbage":
        return struct.pack("=IHHII", 5, 0, 0, 0, 0)
    return b"".join(made[kind](number) for number in SEQUENCES)


KINDS = ("done", "sockets", "errors", "acks", "garbage")


class Attacker:
    """A process with CONNECTIONS in a network namespace of its own; skips where it may not be."""

    def __enter__(self) -> Self:
        self._socket, other = socket.socketpair()
        self._socket.settimeout(DEADLINE_S)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self._socket.close()
                status = _attack(other)
            finally:
                os._exit(status)
        other.close()
        self._lines = self._socket.makefile("r")
        said = json.loads(self._lines.readline())
        if said in REFUSED:
            self.__exit__(None, None, None)
            pytest.skip(f"no user namespace can be made: {os.strerror(said)}")
        assert said == 0, os.strerror(said)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._socket.close()  # which ends it
        os.waitpid(self.pid, 0)

    @contextmanager
    def flooding(self, kind: str) -> Iterator[dict[str, int]]:
        """Meanwhile, whatever listens there gets forged messages. Afterwards, the counts say how
        many were delivered and how many refused."""
        counts: dict[str, int] = {}
        self._socket.sendall(kind.encode() + b"\n")
        try:
            yield counts
        finally:
            self._socket.sendall(b"\n")
            while not counts:
                counts.update(json.loads(self._lines.readline()))

    def wait_until_it_has_tried(self) -> None:
        """Until each socket there is has been sent to, within flooding()."""
        assert json.loads(self._lines.readline()) == {}


def _attack(parent: socket.socket) -> int:
    """What the process does: floods, each time the parent asks for it."""
    become_nobody()
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # for /proc/self/uid_map
    with ExitStack() as stack:
        try:
            enter_with_users(0, 0)
        except OSError as failed:
            parent.sendall(json.dumps(failed.errno).encode() + b"\n")
            return 0
        ends = Ends("127.0.0.1", stack)
        for _ in range(CONNECTIONS):
            ends.connect()
        own = stack.enter_context(
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        )
        own.bind((0, 0))
        parent.sendall(b"0\n")
        orders = stack.enter_context(parent.makefile("r"))
        while order := orders.readline().strip():
            counts = _flood(parent, own, order)
            orders.readline()
            parent.sendall(json.dumps(counts).encode() + b"\n")
    return 0


def _flood(parent: socket.socket, own: socket.socket, kind: str) -> dict[str, int]:
    counts = {"delivered": 0, "refused": 0}
    has_told = False
    while not select.select([parent], [], [], 0)[0]:
        targets = _port_ids() - {own.getsockname()[0]}
        for target in targets:
            try:
                own.sendto(forged(kind, target), socket.MSG_DONTWAIT, (target, 0))
                counts["delivered"] += 1
            except BlockingIOError:
                pass  # its buffer is full
            except OSError:
                counts["refused"] += 1
        if targets and not has_told:
            parent.sendall(b"{}\n")
            has_told = True
    return counts


def _port_ids() -> set[int]:
    lines = Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return {int(row[2]) for row in rows if int(row[1]) == NETLINK_SOCK_DIAG} - {0}

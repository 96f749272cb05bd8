"""A kernel whose sockets and answers the test chooses, for the dropper."""

from __future__ import annotations

import errno
import socket
import struct

from kecho.drop import _sockdiag
from kecho.drop.states import NAMES

NUMBERS = {name: number for number, name in NAMES.items()}


def identity(family: int, local: str, lport: int, peer: str, pport: int, cookie: int) -> bytes:
    source, target = (socket.inet_pton(family, one).ljust(16, b"\0") for one in (local, peer))
    return struct.pack("!BHH16s16s", family, lport, pport, source, target) + struct.pack(
        "=IQ", 0, cookie
    )


def row(
    state: str,
    local: str,
    lport: int,
    peer: str,
    pport: int,
    *,
    cookie: int = 7,
    inode: int = 5,
    idle_ms: int | None = None,
    is_mptcp: bool = False,
) -> _sockdiag.Row:
    family = int(socket.AF_INET6 if ":" in local else socket.AF_INET)
    key = identity(family, local, lport, peer, pport, cookie)
    ends = (local, lport, peer, pport)
    return (
        family,
        NUMBERS[state],
        *ends,
        0,
        cookie,
        0,
        0,
        0,
        0,
        0,
        0,
        inode,
        idle_ms,
        is_mptcp,
        key,
    )


class Kernel:
    """Shows the rows that it was given; the error of a cookie is what destroy answers."""

    def __init__(self, *rows: _sockdiag.Row, errors: dict[int, int] | None = None) -> None:
        self.rows, self.errors = list(rows), errors or {}
        self.asked: list[bytes] = []
        self.survive = False

    def dump(
        self, family: int, states: int, local_port: int = 0, peer_port: int = 0
    ) -> list[_sockdiag.Row]:
        return [
            one
            for one in self.rows
            if one[0] == family
            and states >> one[1] & 1
            and local_port in (0, one[3])
            and peer_port in (0, one[5])
        ]

    def destroy(self, identities: list[bytes]) -> list[int]:
        assert 0 < len(identities) <= _sockdiag.MOST_AT_ONCE
        self.asked += identities
        answers = []
        for one in identities:
            (cookie,) = struct.unpack("=Q", one[-8:])
            answers.append(self.errors.get(cookie, 0))
            if answers[-1] in (0, _sockdiag.UNANSWERED) and not self.survive:
                self.rows = [each for each in self.rows if each[-1] != one]
        return answers

    def states(self, identities: list[bytes], idle_ms: int = 0) -> list[int]:
        now = {one[-1]: one[1] for one in self.rows}
        return [now.get(one, -errno.ENOENT) for one in identities]

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass


A = ("127.0.0.1", 1000, "127.0.0.1", 80)
PAIR_A = "127.0.0.1:1000 127.0.0.1:80"

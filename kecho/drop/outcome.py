"""What became of each socket, and what a command's exit status makes of that."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .pairs import Pair
from .socket import Socket

__all__ = ["Outcome", "Result", "exit_status"]

EXIT_DROPPED = 0
EXIT_NOTHING = 1
EXIT_NOT_DROPPED = 3
EXIT_NO_PERMISSION = 4
EXIT_UNSUPPORTED = 5

# Python calls 95 ENOTSUP, the kernel and its manuals EOPNOTSUPP.
ERROR_NAMES = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}

NO_PERMISSION = (
    "dropping sockets needs CAP_NET_ADMIN, for one's own sockets, too: use sudo, or give it to"
    " Python with `setcap cap_net_admin+ep PYTHON`, or to one command with"
    " `sudo capsh --user=$USER --inh=cap_net_admin --addamb=cap_net_admin -- -c COMMAND`"
)
CANNOT = (
    "the kernel cannot drop it: that needs CONFIG_INET_DIAG_DESTROY=y (Linux 4.9 or newer), and"
    " Linux 6.0 for sockets in time-wait"
)
NO_SOCK_DIAG = (
    "the kernel has no NETLINK_SOCK_DIAG for TCP: CONFIG_INET_DIAG and CONFIG_INET_TCP_DIAG, or"
    " `modprobe tcp_diag`"
)


SUBFLOW = "a subflow of MPTCP: its data goes on over the others"


class Result(StrEnum):
    """DROPPED: by us. GONE: no such socket, or it ended or its tuple was taken meanwhile. REFUSED:
    the kernel said no, or it is still there. UNSUPPORTED: the kernel cannot. PROTECTED: it is
    there, but not what was asked for."""

    DROPPED = "dropped"
    GONE = "gone"
    REFUSED = "refused"
    UNSUPPORTED = "unsupported"
    PROTECTED = "protected"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The fate of one socket. socket is None if none was found for the pair; errno is the kernel's
    answer, None if it was not asked or has not answered; reason is empty when dropped, but for a
    subflow of MPTCP."""

    pair: Pair
    result: Result
    socket: Socket | None = None
    errno: int | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "local": str(self.pair.local),
            "peer": str(self.pair.peer),
            "state": self.socket.state if self.socket else None,
            "result": str(self.result),
            "errno": ERROR_NAMES.get(self.errno) if self.errno else None,
            "reason": self.reason,
        }


def answer(socket: Socket, error: int) -> Outcome:
    """The outcome for what the kernel answered: 0 or an errno."""
    if error == 0:
        reason = SUBFLOW if socket.is_mptcp else ""
        return Outcome(socket.pair, Result.DROPPED, socket, reason=reason)
    if error == errno.ENOENT:
        return Outcome(socket.pair, Result.GONE, socket, error, "ended, or reused, meanwhile")
    if error in (errno.EPERM, errno.EACCES):
        return Outcome(socket.pair, Result.REFUSED, socket, error, "no permission")
    if error == errno.EOPNOTSUPP:
        return Outcome(socket.pair, Result.UNSUPPORTED, socket, error, "the kernel cannot")
    return Outcome(socket.pair, Result.REFUSED, socket, error, os.strerror(error))


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """The worst of them; see the epilog of --help."""
    status = EXIT_NOTHING
    seen = set()
    for one in outcomes:
        denied = one.errno in (errno.EPERM, errno.EACCES)
        seen.add("denied" if denied else str(one.result))
    for name, code in (
        ("denied", EXIT_NO_PERMISSION),
        ("unsupported", EXIT_UNSUPPORTED),
        ("refused", EXIT_NOT_DROPPED),
        ("protected", EXIT_NOT_DROPPED),
        ("gone", EXIT_NOTHING),
        ("dropped", EXIT_DROPPED),
    ):
        if name in seen:
            return code
    return status

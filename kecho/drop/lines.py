"""Whole lines of other tools: ss(8), netstat(8), lsof(8), /proc/net/tcp; and of our own --list."""

from __future__ import annotations

import re
import socket
import struct

from .states import NAMES

__all__ = ["ends_of", "has_program", "is_header", "is_rest_of_ss"]

# The protocol, the state, two queues, the two ends, and whatever the tool was asked for.
_SS_OR_NETSTAT = re.compile(
    r"(?:(?P<protocol>[a-z][a-z0-9_]*) +)?(?:[A-Z][A-Z0-9-]* +)?\d+ +\d+ +(\S+) +(\S+)"
    r"(?P<rest> .*)?"
)
# Behind the ends, netstat -p has the state, with -e user and inode, and the program, whose name
# may have any character.
_PROGRAM = re.compile(r" +[A-Z][A-Z0-9_]*(?: +\S+ +\d+)? +(?:-(?: .*)?|\d+/.*)")
# ss writes names as they are, too, of 15 characters at most (TASK_COMM_LEN): a newline in one cuts
# the line, of which the beginning does not match, and the rest has its quotation mark alone. Atomic
# and possessive, as there are many ways to read names that hold quotation marks.
_USERS = re.compile(
    r'[^"]*users:\((?>\(".{0,15}?",pid=\d+,(?:tid=\d+,)?(?:proc_ctx=[^ ")]*,)?fd=\d+'
    r'(?:,sock_ctx=[^ ")]*)?\),?)++\)(?: [^"]*)?'
)
_REST_OF_USERS = re.compile(r'",pid=\d+,')
_OURS = re.compile(rf"(?:{'|'.join(NAMES.values())}) +(\S+) +(\S+) +\d+ +\d+ .*")
_PROC = re.compile(r"\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) ([0-9A-F]+):([0-9A-F]{4}) .*")
# udp4_format_sock() ends with inode, references, pointer and drops. Of TCP, a line ends with the
# pointer in time-wait and syn-recv, 12 columns, and otherwise 5 behind it.
_COLUMNS_OF_UDP = 13
_STATE_OF_LSOF = re.compile(r"\([A-Z0-9_]+\)")
_HEADER = re.compile(
    r"Active Internet connections .*|Proto +Recv-Q .*|(?:Netid +)?(?:State +)?Recv-Q +Send-Q .*"
    r"|COMMAND +PID .*|sl +local_address .*|STATE +LOCAL .*"
)


def is_header(line: str) -> bool:
    """line: without white space around it, as for ends_of()."""
    return _HEADER.fullmatch(line) is not None


def has_program(line: str) -> bool:
    """Whether it is a line of netstat -p. A name in it may go on in what looks like lines of its
    own, which are too short to be of netstat -p: it cuts names at 20 characters."""
    found = _SS_OR_NETSTAT.fullmatch(line.replace("\t", " "))
    return bool(found and found["protocol"] and _PROGRAM.fullmatch(found["rest"] or ""))


def is_rest_of_ss(text: str) -> bool:
    """Whether it holds what ss writes behind the name of a process."""
    return _REST_OF_USERS.search(text) is not None


def ends_of(line: str) -> tuple[str, str] | None:
    """The local end and the peer's, as text, of a line of such a tool; None if it is of none.

    What else is in the line, such as a state, is passed over. Raises ValueError for a socket that
    is not TCP.
    """
    line = line.replace("\t", " ")
    if found := _SS_OR_NETSTAT.fullmatch(line):
        protocol = found["protocol"]
        if protocol not in (None, "tcp", "tcp6"):
            raise ValueError(f"{protocol[:20]}: only TCP sockets are dropped")
        rest = found["rest"] or ""
        if '"' in rest and not (_USERS.fullmatch(rest) or (protocol and _PROGRAM.fullmatch(rest))):
            raise ValueError(
                "a quotation mark where ss has none: a newline in the name of a process may have"
                " cut the line; ss -tn prints no names"
            )
        return found[2], found[3]
    if found := _OURS.fullmatch(line):
        return found[1], found[2]
    if found := _PROC.fullmatch(line):
        if len(line.split()) == _COLUMNS_OF_UDP:
            raise ValueError("a line of /proc/net/udp, raw or icmp: only TCP sockets are dropped")
        return _of_proc(found[1], found[2]), _of_proc(found[3], found[4])
    return _of_lsof(line.split())


def _of_lsof(words: list[str]) -> tuple[str, str] | None:
    """LOCAL->PEER or, of a listener, its address; behind TCP, and before the state."""
    state = words.pop() if words and _STATE_OF_LSOF.fullmatch(words[-1]) else ""
    if not words:
        return None
    *columns, name = words
    kind = _type_of_lsof(columns)
    if kind is None and columns not in ([], ["TCP"]):
        return None
    # A device's name may hold "->", but no ":".
    local, arrow, peer = name.rpartition("->")
    if arrow and local.rpartition(":")[2].isdigit():
        return local, peer
    if state != "(LISTEN)" or not columns:
        return None
    nowhere = "[::]" if kind == "IPv6" else "0.0.0.0"
    return name.replace("*", nowhere), f"{nowhere}:*"


def _type_of_lsof(columns: list[str]) -> str | None:
    """IPv4 or IPv6; None if these are not the columns of a TCP socket, each at its place: COMMAND
    PID USER FD TYPE DEVICE SIZE/OFF NODE, of which none holds a space (lsof(8)). The name of a file
    does, and may look like the end of such a line.
    """
    if len(columns) != 8 or not columns[1].isdigit() or columns[7] != "TCP":
        return None
    return columns[4] if columns[4] in ("IPv4", "IPv6") else None


def _of_proc(address: str, port: str) -> str:
    """proc_pid_net(5): words of 32 bits as the machine stores them, and the port as it is read."""
    raw = b"".join(
        struct.pack("=I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8)
    )
    number = int(port, 16) or "*"
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{number}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{number}"

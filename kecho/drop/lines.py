"""Whole lines of other tools: ss(8), netstat(8), lsof(8), /proc/net/tcp; and of our own --list."""

from __future__ import annotations

import re
import socket
import struct

__all__ = ["ends_of", "is_header"]

# The protocol, the state, two queues, the two ends, and whatever the tool was asked for.
_SS_OR_NETSTAT = re.compile(
    r"(?:(?P<protocol>[a-z][a-z0-9_]*) +)?(?:[A-Z][A-Z0-9-]* +)?\d+ +\d+ +(\S+) +(\S+)(?: .*)?"
)
_OURS = re.compile(r"[a-z][a-z0-9-]* +(\S+) +(\S+) +\d+ +\d+ .*")
_PROC = re.compile(r"\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) ([0-9A-F]+):([0-9A-F]{4}) .*")
# udp4_format_sock() ends with inode, references, pointer and drops. Of TCP, a line ends with the
# pointer in time-wait and syn-recv, 12 columns, and otherwise 5 behind it.
_COLUMNS_OF_UDP = 13
_HEADER = re.compile(
    r"Active Internet connections .*|Proto +Recv-Q .*|(?:Netid +)?(?:State +)?Recv-Q +Send-Q .*"
    r"|COMMAND +PID .*|sl +local_address .*|STATE +LOCAL .*"
)


def is_header(line: str) -> bool:
    """line: without white space around it, as for ends_of()."""
    return _HEADER.fullmatch(line) is not None


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
    state = words.pop() if words and words[-1].startswith("(") else ""
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

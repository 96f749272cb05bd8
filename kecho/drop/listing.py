"""--list: the sockets that match, as a table or JSON on standard output."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from .. import command
from ..printable import json_text
from . import outcome as outcomes
from .config import DropConfig
from .process import Holder, holders
from .search import PROGRAM
from .socket import Socket

__all__ = ["flush", "list_sockets", "say_lost"]

HEADER = ("STATE", "LOCAL", "PEER", "RECV-Q", "SEND-Q", "TIMER", "PROCESS")


def list_sockets(config: DropConfig, found: Sequence[Socket]) -> int:
    """Prints them; the exit status."""
    held = holders(one.inode for one in found if one.inode)
    try:
        if config.json:
            command.put(json_text({"sockets": [_row(one, held.get(one.inode)) for one in found]}))
        elif not config.quiet and found:
            lines = [HEADER, *(_line(one, held.get(one.inode)) for one in found)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            command.put(
                "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
            )
        flush()
    except OSError as error:
        return say_lost(error)
    return 0 if found else outcomes.EXIT_NOTHING


def _row(one: Socket, holder: Holder | None) -> dict[str, object]:
    row = {name: value for name, value in one._asdict().items() if name != "identity"}
    return {**row, "uid": one.owner, "process": holder._asdict() if holder else None}


def _line(one: Socket, holder: Holder | None) -> tuple[str, ...]:
    timer = "-" if one.timer == "off" else f"{one.timer} {one.expires_ms / 1000:.1f}s"
    if one.retransmissions:
        timer += f" ({one.retransmissions})"
    process = f"{holder.pid}/{command.one_line(holder.name)}" if holder else "?"
    process = process if one.inode else "-"
    ends = tuple(command.one_line(str(end)) for end in one.pair)
    if one.is_mptcp:
        process += "  mptcp"
    queues = str(one.receive_queue), str(one.send_queue)
    return (one.state, *ends, *queues, timer, process)


def flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def say_lost(error: OSError) -> int:
    """What was to be printed is lost: its reader has enough, or its disk is full. The status."""
    if sys.stdout is not None:
        command.discard(sys.stdout)
    if error.errno != errno.EPIPE:
        command.say_error(PROGRAM, f"standard output: {error.strerror or error}")
    return outcomes.EXIT_NOT_DROPPED

"""Priorities for systemd's journal, which reads them at the beginning of a line: sd-daemon(3)."""

from __future__ import annotations

import os

__all__ = ["ERROR", "is_journal", "with_priority"]

ERROR = 40  # as logging has it, which not every command imports
_PRIORITIES = ((ERROR, 3), (30, 4), (20, 6))  # logging's levels from which on it is this


def is_journal(fd: int) -> bool:
    """Whether this very descriptor goes to the journal: JOURNAL_STREAM in systemd.exec(5). It may
    have been redirected since the manager wrote the variable."""
    try:
        facts = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{facts.st_dev}:{facts.st_ino}"


def with_priority(text: str, level: int) -> str:
    """Each line of a text with the priority of one of logging's levels."""
    priority = next((priority for least, priority in _PRIORITIES if level >= least), 7)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))

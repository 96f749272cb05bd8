"""Which process a number stands for: numbers are used again."""

from __future__ import annotations

from pathlib import Path

__all__ = ["start_time"]


def start_time(pid: int, *, zombie: bool = False) -> int | None:
    """When a process was started, in clock ticks since the boot; None if it runs no more.

    With the pid it names a process for good, as a number comes round again only after all others.
    See proc_pid_stat(5). zombie: also of one whose first thread has ended, though others may run.
    Raises PermissionError if it may not be looked at (hidepid=1, proc(5)).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # from the third on; the second may have any character
    return int(fields[19]) if zombie or fields[0] not in "ZX" else None

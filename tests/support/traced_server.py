"""A server process under strace(1)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.server_process import ServerProcess

EPOLL_WAIT = "?epoll_wait,epoll_pwait"  # some machines have only the second


@dataclass
class TracedServer:
    """`python -m kecho` under strace, with one worker unless told otherwise."""

    process: ServerProcess
    log: Path

    @property
    def port(self) -> int:
        return self.process.port

    def calls(self) -> list[tuple[str, str, str]]:
        """Thread, name, and arguments with the result of each call, once the process has ended."""
        found: list[tuple[str, str, str]] = []
        unfinished: dict[str, int] = {}
        for line in self.log.read_text().splitlines():
            if begun := re.match(r"(\d+) +(\w+)\((.*?)(<unfinished \.\.\.>)?$", line):
                thread, name, rest, interrupted = begun.groups()
                if interrupted:
                    unfinished[thread] = len(found)
                found.append((thread, name, rest))
            elif resumed := re.match(r"(\d+) +<\.\.\. (\w+) resumed>(.*)$", line):
                thread, name, rest = resumed.groups()
                begun_at = unfinished.pop(thread)
                found[begun_at] = (thread, name, found[begun_at][2] + rest)
        return found

    def count(self, name: str) -> int:
        return sum(called == name for _, called, _ in self.calls())

    @property
    def injected(self) -> int:
        return self.log.read_text().count("(INJECTED)")


StartTraced = Callable[..., TracedServer]

"""What the kernel says while tests run: /dev/kmsg, as in Documentation/ABI/testing/dev-kmsg."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

TROUBLE = re.compile(r"WARNING: |BUG: |Oops: |hogged CPU|blocked for more than \d+ seconds")
# SECURITY.md names it: once per boot, when a flow of --engine sockmap ends (seen on Linux 6.18).
KNOWN = re.compile(r"net/ipv4/af_inet\.c:\d+ inet_sock_destruct")
RECORD_BYTES = 8192


class KernelLog:
    """Its new messages; none where it cannot be read."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1

    def new_messages(self) -> list[str]:
        """Those since the last call."""
        found: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, RECORD_BYTES)
            except BrokenPipeError:
                continue  # messages that have been overwritten meanwhile
            except OSError:  # EAGAIN: that was the last one
                break
            found.append(record.decode(errors="replace").partition(";")[2].splitlines()[0])
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def troubles(messages: Iterable[str]) -> list[str]:
    """Those that report a fault of the kernel."""
    return [one for one in messages if TROUBLE.search(one) and not KNOWN.search(one)]

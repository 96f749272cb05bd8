"""Which kernel this is."""

from __future__ import annotations

import os
import re

__all__ = ["RELEASE", "VERSION"]


def _release() -> str:
    try:
        return os.uname().release
    except OSError:  # what confines this process may refuse it
        return "unknown (uname: refused)"


# Asked when imported: in the sandbox uname(2) is refused.
RELEASE = _release()  # "6.1.0-18-amd64"
VERSION = tuple(int(part) for part in re.findall(r"\d+", RELEASE)[:2])  # (6, 1); unknown: ()

"""Which kernel this is."""

from __future__ import annotations

import os
import re

__all__ = ["RELEASE", "VERSION"]

# Asked when imported: in the sandbox uname(2) is refused.
RELEASE = os.uname().release  # "6.1.0-18-amd64"
VERSION = tuple(int(part) for part in re.findall(r"\d+", RELEASE)[:2])  # (6, 1)

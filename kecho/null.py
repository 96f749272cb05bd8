"""Where output goes that nobody can have."""

from __future__ import annotations

import os

__all__ = ["open_null"]


def open_null() -> int:
    """A descriptor that takes what is written to it, and has nothing to read: /dev/null, or where
    there is none, as in a bare chroot, an empty file in memory (memfd_create(2))."""
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:
        return os.memfd_create("null")

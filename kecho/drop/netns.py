"""Named network namespaces: ip-netns(8)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_name", "open_namespace"]

DIRECTORY = Path("/run/netns")


def check_name(name: str) -> str:
    """Raises ValueError for what `ip netns` would not make either."""
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name) > 255:
        raise ValueError(f"{name[:60]!r} is not the name of a network namespace")
    return name


def open_namespace(name: str) -> int:
    """A descriptor of it, which the caller closes. Raises OSError."""
    path = DIRECTORY / check_name(name)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno, f"there is no network namespace {name!r} in {DIRECTORY}"
        ) from None

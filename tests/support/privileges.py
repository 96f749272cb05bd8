"""Whether this process may do what root may: by its capabilities, and not by its user id.

Root of a container often lacks some of them, and root of a user namespace has them for what belongs
to that namespace alone: capabilities(7), user_namespaces(7).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# <linux/capability.h>; what the tests use of what root has.
NEEDED = {
    "CAP_CHOWN": 0,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}
ALL_IDS = "0 0 4294967295"  # uid_map of the initial user namespace


def why_not() -> str | None:
    """Why this process is less than root; None: it is root, in the initial user namespace."""
    if Path("/proc/self/uid_map").read_text().split() != ALL_IDS.split():
        return "needs root of the initial user namespace"
    found = re.search(r"^CapEff:\t(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    effective = int(found[1], 16)
    missing = [name for name, number in NEEDED.items() if not effective >> number & 1]
    if not missing:
        return None
    return "needs root" if len(missing) == len(NEEDED) else f"needs root with {missing[0]}"


def is_root() -> bool:
    return why_not() is None


def skip_unless_root() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)


needs_root = pytest.mark.skipif(not is_root(), reason=why_not() or "")

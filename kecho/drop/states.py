"""The states of a TCP socket, by the names of ss(8)."""

from __future__ import annotations

__all__ = ["NAMES", "parse_state"]

# enum in <net/tcp_states.h>; 12 is a request socket, which the kernel shows as 3.
NAMES = {
    1: "established",
    2: "syn-sent",
    3: "syn-recv",
    4: "fin-wait-1",
    5: "fin-wait-2",
    6: "time-wait",
    7: "close",
    8: "close-wait",
    9: "last-ack",
    10: "listen",
    11: "closing",
}
_ALL = frozenset(NAMES.values()) - {"close"}
_CONNECTED = _ALL - {"listen"}
ALIASES = {
    "all": _ALL,
    "connected": _CONNECTED,
    "synchronized": _CONNECTED - {"syn-sent"},
    "bucket": frozenset({"syn-recv", "time-wait"}),
    "big": _ALL - {"syn-recv", "time-wait"},
    "listening": frozenset({"listen"}),
}


def parse_state(text: str) -> frozenset[str]:
    """The states that names or aliases of ss, parted by commas, stand for. Raises ValueError."""
    return frozenset().union(*map(_parse_one, text.split(",")))


def _parse_one(text: str) -> frozenset[str]:
    name = text.lower().replace("_", "-")
    if name in ALIASES:
        return ALIASES[name]
    # netstat writes TIME_WAIT, FIN_WAIT1, ss FIN-WAIT-1 and ESTAB.
    name = {
        "fin-wait1": "fin-wait-1",
        "fin-wait2": "fin-wait-2",
        "estab": "established",
        "timewait": "time-wait",
    }.get(name, name)
    if name in _ALL:
        return frozenset({name})
    known = ", ".join(sorted({*_ALL, *ALIASES}))
    raise ValueError(f"must be one of: {known} (got {text[:40]!r})")

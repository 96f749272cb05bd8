"""kecho.drop: finds TCP sockets and drops exactly those, by the kernel's SOCK_DESTROY.

>>> from kecho import drop
>>> drop.drop(drop.find(states=["time-wait"], peer=[":12345"]))
>>> drop.drop([("127.0.0.1", 36986, "127.0.0.1", 12345)])
"""

from __future__ import annotations

from .api import drop, find
from .diag import Diag
from .outcome import Outcome, Result
from .pairs import Endpoint, Pair, PairError, parse_pairs
from .socket import Socket

__all__ = [
    "Diag",
    "Endpoint",
    "Outcome",
    "Pair",
    "PairError",
    "Result",
    "Socket",
    "drop",
    "find",
    "parse_pairs",
]

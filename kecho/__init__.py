"""kecho: an echo server whose hot path never holds the GIL.

>>> import kecho
>>> kecho.serve(port=12345)                    # until SIGINT, SIGTERM, SIGHUP
>>> with kecho.Server(port=0) as server:       # beside your own code
...     print(server.port)

The benchmark client is kecho.bench, the socket dropper kecho.drop. None of the three loads
another: each name is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .errors import EngineError, ListenerLostError, ListenError, OptionError
    from .server.config import ServerConfig
    from .server.foreground import serve
    from .server.keywords import ServerOptions
    from .server.server import Server
    from .server.stats import AcceptQueue, Counters, NamedCounts, Stats, UdpCounters

__all__ = [
    "AcceptQueue",
    "Counters",
    "EngineError",
    "ListenError",
    "ListenerLostError",
    "NamedCounts",
    "OptionError",
    "Server",
    "ServerConfig",
    "ServerOptions",
    "Stats",
    "UdpCounters",
    "__version__",
    "serve",
]

_MODULE_OF = {
    "AcceptQueue": "server.stats",
    "Counters": "server.stats",
    "EngineError": "errors",
    "ListenError": "errors",
    "ListenerLostError": "errors",
    "NamedCounts": "server.stats",
    "OptionError": "errors",
    "Server": "server.server",
    "ServerConfig": "server.config",
    "ServerOptions": "server.keywords",
    "Stats": "server.stats",
    "UdpCounters": "server.stats",
    "serve": "server.foreground",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

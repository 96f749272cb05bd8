"""kecho: an echo server whose hot path never holds the GIL.

>>> import kecho
>>> kecho.serve(port=12345)                    # until SIGINT or SIGTERM
>>> with kecho.Server(port=0) as server:       # beside your own code
...     print(server.port)
"""

from ._version import __version__
from .config import ServerConfig
from .errors import ListenError, OptionError
from .foreground import serve
from .server import Server
from .stats import Counters, NamedCounts, Stats

__all__ = [
    "Counters",
    "ListenError",
    "NamedCounts",
    "OptionError",
    "Server",
    "ServerConfig",
    "Stats",
    "__version__",
    "serve",
]

"""Define the options of the server, each one once.

A field of ServerConfig carries its default, its help text, its parser (for the text of a flag or an
environment variable), its check, and its group. The command line, the environment and the keyword
arguments of kecho.Server derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..errors import OptionError
from ..options import (
    Option,
    check_fields,
    check_uds_path,
    choice,
    configuration,
    describe_options,
    integer,
    is_abstract,
    option,
    options_of,
    seconds,
    size,
    switch,
)
from . import values
from .access import check_prefixes, parse_prefixes, rules_of
from .arguments import SERVING, check_options
from .public import PUBLIC

__all__ = ["SECURITY", "ServerConfig", "check_timeout", "environment_variable"]

ENVIRONMENT_PREFIX = "KECHO_"
MOST_THREADS = 1024
MOST_CONNECTIONS = 2**32 - 2
MOST_DATAGRAMS_PER_S = 100_000_000
DEFAULT_KEEPALIVE_S = 60
SOCKET_MEMORY_LEAST = 1 << 16
LONGEST_KEEPALIVE_S = 32767  # MAX_TCP_KEEPIDLE of <net/tcp.h>

# The headings of --help.
LISTENING, LIMITS, UDP, SECURITY = "Listening", "Limits", "UDP", "Security"


def environment_variable(name: str) -> str:
    """Return the environment variable of an option."""
    return ENVIRONMENT_PREFIX + name.upper()


@configuration
class ServerConfig:
    """The options of a server, checked and frozen.

    ServerConfig(port=0, ...) raises OptionError (a ValueError) for a wrong value and TypeError for
    an unknown option. An attribute has the type that is listed here. The options:
    """

    port: int = option(
        integer("TCP port. 0 takes a free port and prints it.", 0, 65535), LISTENING, default=12345
    )
    host: tuple[str, ...] = option(
        Option(
            "Address or name to listen on; repeatable. Other hosts can reach 0.0.0.0 and ::.",
            values.parse_hosts,
            values.check_hosts,
            "ADDRESS",
            repeatable=True,
        ),
        LISTENING,
        default=("127.0.0.1",),
    )
    uds: str | None = option(
        Option(
            "Unix socket to listen on, instead of TCP unless --host or --port is given. "
            "@NAME is abstract.",
            str,
            check_uds_path,
            "PATH",
        ),
        LISTENING,
        default=None,
    )
    backlog: int = option(
        integer(
            "Length of each accept queue. The kernel caps it at net.core.somaxconn.", 0, 2**31 - 1
        ),
        LISTENING,
        default=128,
    )
    reuse_port: bool = option(
        switch("Let several server processes listen on the same port (SO_REUSEPORT)."),
        LISTENING,
        default=False,
    )
    fd: tuple[int, ...] = option(
        Option(
            "Inherited listening socket, instead of TCP unless --host or --port is given; "
            "repeatable.",
            values.parse_fds,
            values.check_fds,
            "N",
            repeatable=True,
        ),
        LISTENING,
        default=(),
    )
    uds_mode: int | None = option(
        Option(
            "Permissions of the Unix socket's file, in octal. Clients need write permission.",
            values.parse_mode,
            values.check_mode,
            "MODE",
        ),
        LISTENING,
        default=None,
    )
    uds_owner: str | None = option(
        Option(
            "Owner of the Unix socket's file, by name or number. :GROUP sets the group alone.",
            str,
            values.check_owner,
            "USER[:GROUP]",
        ),
        LISTENING,
        default=None,
    )
    dispatch: Literal["shared", "percpu"] = option(
        choice(
            "shared: one queue for all threads. percpu: a pinned thread and a queue for each CPU.",
            "shared",
            "percpu",
        ),
        SERVING,
        default="shared",
    )
    engine: Literal["epoll", "io_uring", "sockmap", "auto"] = option(
        choice(
            "How connections are echoed: see Engines below.",
            "epoll",
            "io_uring",
            "sockmap",
            "auto",
        ),
        SERVING,
        default="epoll",
    )
    threads: int | None = option(
        integer(
            "Worker threads. Default: one for each usable CPU (affinity, cgroup quota).",
            1,
            MOST_THREADS,
            optional=True,
        ),
        SERVING,
        default=None,
    )
    busy_poll: int | Literal["auto", "forever"] = option(
        Option(
            "Time that an idle thread polls before it sleeps. auto: only under load. "
            "forever: never sleep.",
            values.parse_busy_poll,
            values.check_busy_poll,
            "MICROSECONDS|auto|forever",
        ),
        SERVING,
        default=0,
    )
    graceful_timeout: float = option(
        seconds("How long a stop goes on echoing what was received.", zero=True),
        SERVING,
        default=5.0,
    )
    public: bool = option(
        switch("Set limits for a server that strangers can reach: see below."),
        LIMITS,
        default=False,
    )
    max_connections: int | None = option(
        integer(
            "At most N open connections. Further clients wait in the accept queue.",
            1,
            MOST_CONNECTIONS,
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    max_connections_per_ip: int | None = option(
        integer(
            "At most N open connections per client address (IPv6: per /64; Unix: per user); "
            "others are reset.",
            1,
            MOST_CONNECTIONS,
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    rate_limit: int | None = option(
        integer(
            "At most N new connections a second per client address (IPv6: per /64; Unix: per "
            "user); others are reset.",
            1,
            1_000_000,
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    idle_timeout: float | None = option(
        seconds("Close a connection on which no byte has moved for this long.", optional=True),
        LIMITS,
        default=None,
    )
    write_timeout: float | None = option(
        seconds(
            "Close a connection whose client has taken no byte of its echo for this long.",
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    keepalive: int | None = option(
        integer(
            "Probe a TCP client after SECONDS of silence. 0: never. "
            "Default with a limit on connections: 60.",
            0,
            LONGEST_KEEPALIVE_S,
            "SECONDS",
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    max_buffer_memory: int | None = option(
        size(
            "At most BYTES of unsent data; beyond it slow clients are reset. Default: up to 256M.",
            1 << 16,
            1 << 62,
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    socket_memory: int | None = option(
        size(
            "At most BYTES of kernel memory per TCP connection, half each way. "
            "Default: the kernel decides.",
            SOCKET_MEMORY_LEAST,
            1 << 31,
            optional=True,
        ),
        LIMITS,
        default=None,
    )
    udp: bool = option(
        switch("Echo datagrams as well, on the same addresses and port (RFC 862)."),
        UDP,
        default=False,
    )
    udp_rate: int = option(
        integer(
            "Datagrams a second answered to one source address (IPv6: one /64). 0: no limit.",
            0,
            MOST_DATAGRAMS_PER_S,
        ),
        UDP,
        default=10_000,
    )
    udp_rate_total: int = option(
        integer(
            "Datagrams a second answered to all sources together. 0: no limit.",
            0,
            MOST_DATAGRAMS_PER_S,
        ),
        UDP,
        default=100_000,
    )
    udp_rate_repeated: int = option(
        integer(
            "Repeated datagrams a second answered to one source; ends echo loops. 0: no limit.",
            0,
            MOST_DATAGRAMS_PER_S,
        ),
        UDP,
        default=10,
    )
    udp_min_source_port: int = option(
        integer(
            "Lowest source port that is answered. Services on lower ports may reply to the echo.",
            1,
            65535,
        ),
        UDP,
        default=1024,
    )
    allow: tuple[str, ...] = option(
        Option(
            "Serve only these clients. The most specific of --allow and --deny wins; repeatable.",
            parse_prefixes,
            check_prefixes,
            "CIDR",
            repeatable=True,
        ),
        SECURITY,
        default=(),
    )
    deny: tuple[str, ...] = option(
        Option(
            "Do not serve these clients. The most specific of --allow and --deny wins; repeatable.",
            parse_prefixes,
            check_prefixes,
            "CIDR",
            repeatable=True,
        ),
        SECURITY,
        default=(),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in PUBLIC if self.public else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, PUBLIC[name])
        if not self.host and self.uds is None and not self.fd:
            raise OptionError(
                "host",
                "must name an address, unless a Unix socket or a descriptor is given",
            )
        rules_of(self.allow, self.deny)  # they agree with each other
        for name in ("uds_mode", "uds_owner"):
            if getattr(self, name) is not None and self.uds is not None and is_abstract(self.uds):
                raise OptionError(name, f"the abstract socket {self.uds} has no file")
        if self.engine == "io_uring" and self.busy_poll != 0:
            raise OptionError("busy_poll", "is not supported by the io_uring engine")
        if self.udp and not self.host:
            raise OptionError("udp", "needs a host or a port: uds and fd take no datagrams")

    @property
    def bounds_clients(self) -> bool:
        """Tell whether some limit keeps one client from holding every connection for ever."""
        return bool(self.allow or self.max_connections_per_ip or self.idle_timeout)

    @property
    def keepalive_s(self) -> int:
        """Return the option keepalive or its default. 0: no probes."""
        if self.keepalive is not None:
            return self.keepalive
        has_limit = self.max_connections is not None or self.max_connections_per_ip is not None
        return DEFAULT_KEEPALIVE_S if has_limit else 0

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> ServerConfig:
        """Make a configuration from the keyword arguments of kecho.Server.

        It also takes ``bench`` (0 is shared, 1 is percpu). It leaves TCP out when ``uds`` or ``fd``
        is given and neither ``host`` nor ``port``. Raises OptionError, and TypeError for an unknown
        option.
        """
        return cls(**check_options(cls, options))


ServerConfig.__doc__ = f"{ServerConfig.__doc__}\n{describe_options(ServerConfig, indent=4)}\n"


def check_timeout(name: str, value: object) -> float:
    """Check the argument of a method as the option of that name. Returns seconds."""
    try:
        checked: float = options_of(ServerConfig)[name].check(value)
    except ValueError as error:
        raise OptionError(name, str(error)) from None
    return checked

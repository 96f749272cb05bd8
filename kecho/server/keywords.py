"""The keyword arguments of kecho.Server and kecho.serve, for editors and type checkers.

Generated from the definitions in config.py by `make format`. Do not edit.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Literal, TypedDict

__all__ = ["ServerOptions"]


class ServerOptions(TypedDict, total=False):
    """The options of kecho.Server and kecho.serve, as keyword arguments."""

    port: int
    """TCP port. 0 takes a free port and prints it. Default: 12345."""

    host: str | Iterable[str]
    """Address or name to listen on; repeatable. Other hosts can reach 0.0.0.0 and ::. Default:
    ('127.0.0.1',).
    """

    uds: str | bytes | PathLike[str] | PathLike[bytes] | None
    """Unix socket to listen on, instead of TCP unless --host or --port is given. @NAME is
    abstract. Default: None.
    """

    backlog: int
    """Length of each accept queue. The kernel caps it at net.core.somaxconn. Default: 128."""

    reuse_port: bool
    """Let several server processes listen on the same port (SO_REUSEPORT). Default: False."""

    fd: int | Iterable[int]
    """Inherited listening socket, instead of TCP unless --host or --port is given; repeatable.
    Default: ().
    """

    uds_mode: int | None
    """Permissions of the Unix socket's file, in octal. Clients need write permission. Default:
    None.
    """

    uds_owner: str | None
    """Owner of the Unix socket's file, by name or number. :GROUP sets the group alone. Default:
    None.
    """

    dispatch: Literal["shared", "percpu"]
    """shared: one queue for all threads. percpu: a pinned thread and a queue for each CPU.
    Default: 'shared'.
    """

    engine: Literal["epoll", "io_uring", "sockmap", "auto"]
    """How connections are echoed: see Engines below. Default: 'epoll'."""

    threads: int | None
    """Worker threads. Default: one for each usable CPU (affinity, cgroup quota)."""

    busy_poll: int | Literal["auto", "forever"]
    """Time that an idle thread polls before it sleeps. auto: only under load. forever: never
    sleep. Default: 0.
    """

    graceful_timeout: float
    """How long a stop goes on echoing what was received. Default: 5.0."""

    public: bool
    """Set limits for a server that strangers can reach: see below. Default: False."""

    max_connections: int | None
    """At most N open connections. Further clients wait in the accept queue. Default: None."""

    max_connections_per_ip: int | None
    """At most N open connections per client address (IPv6: per /64; Unix: per user); others are
    reset. Default: None.
    """

    rate_limit: int | None
    """At most N new connections a second per client address (IPv6: per /64; Unix: per user);
    others are reset. Default: None.
    """

    idle_timeout: float | None
    """Close a connection on which no byte has moved for this long. Default: None."""

    write_timeout: float | None
    """Close a connection whose client has taken no byte of its echo for this long. Default:
    None.
    """

    keepalive: int | None
    """Probe a TCP client after SECONDS of silence. 0: never. Default with a limit on
    connections: 60.
    """

    max_buffer_memory: int | None
    """At most BYTES of unsent data; beyond it slow clients are reset. Default: up to 256M."""

    socket_memory: int | None
    """At most BYTES of kernel memory per TCP connection, half each way. Default: the kernel
    decides.
    """

    udp: bool
    """Echo datagrams as well, on the same addresses and port (RFC 862). Default: False."""

    udp_rate: int
    """Datagrams a second answered to one source address (IPv6: one /64). 0: no limit. Default:
    10000.
    """

    udp_rate_total: int
    """Datagrams a second answered to all sources together. 0: no limit. Default: 100000."""

    udp_rate_repeated: int
    """Repeated datagrams a second answered to one source; ends echo loops. 0: no limit. Default:
    10.
    """

    udp_min_source_port: int
    """Lowest source port that is answered. Services on lower ports may reply to the echo.
    Default: 1024.
    """

    allow: str | Iterable[str]
    """Serve only these clients. The most specific of --allow and --deny wins; repeatable.
    Default: ().
    """

    deny: str | Iterable[str]
    """Do not serve these clients. The most specific of --allow and --deny wins; repeatable.
    Default: ().
    """

    bench: Literal[0, 1]
    """The same as --dispatch: 0 is shared, 1 is percpu. Default: 0."""

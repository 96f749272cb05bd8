"""The options of the server: each one is defined here, once.

A field of ServerConfig carries its default, its help text, how text (of a flag or an environment
variable) becomes a value, and what makes a value valid. The command line, the environment and
the keyword arguments of kecho.Server all derive from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..errors import OptionError
from ..options import (
    Option,
    check_fields,
    check_uds_path,
    choice,
    integer,
    is_abstract,
    option,
    option_of,
    options_of,
    seconds,
    size,
    switch,
)
from .access import check_prefixes, parse_prefixes, rules_of
from .public import PUBLIC, describe_limits

__all__ = ["ServerConfig", "check_options", "check_timeout", "environment_variable"]

ENVIRONMENT_PREFIX = "KECHO_"
MOST_THREADS = 1024
MOST_DATAGRAMS_PER_S = 100_000_000
LONGEST_BUSY_POLL_US = 1_000_000
DEFAULT_KEEPALIVE_S = 60
SOCKET_MEMORY_LEAST = 1 << 16
LONGEST_KEEPALIVE_S = 32767  # MAX_TCP_KEEPIDLE of <net/tcp.h>

Dispatch = Literal["shared", "percpu"]
BusyPoll = int | Literal["auto", "forever"]
EngineName = Literal["epoll", "io_uring", "sockmap", "auto"]


def environment_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _parse_hosts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _check_hosts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{value!r} is neither an address nor several")
    hosts = tuple(value)
    for host in hosts:
        if not isinstance(host, str) or not host or "\0" in host:
            raise ValueError(f"{host!r} is not an address or a name")
    return hosts


def _parse_fds(text: str) -> tuple[int, ...]:
    return tuple(_FD.parse(part.strip()) for part in text.split(","))


def _check_fds(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{value!r} is neither a descriptor nor several")
    # On the command line each is a text of its own.
    fds = tuple(_FD.check(_FD.parse(fd) if isinstance(fd, str) else fd) for fd in value)
    seen: set[int] = set()
    for fd in fds:
        if fd in seen:
            raise ValueError(f"{fd} is given twice")
        seen.add(fd)
    return fds


_FD = integer("a descriptor", 0, 2**31 - 1)
_MODE = integer("permissions", 0, 0o777, optional=True)


def _parse_mode(text: str) -> int:
    if not text or len(text) > 4 or text.strip("01234567") or int(text, 8) > 0o777:
        raise ValueError(f"{text!r} is not an octal number such as 660")
    return int(text, 8)


def _check_owner(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.replace(":", "", 1) or "\0" in value:
        raise ValueError(f"{value!r} is not a user")
    return value


_MICROSECONDS = integer("how long", 0, LONGEST_BUSY_POLL_US)
_BUSY_POLL_WORDS = ("auto", "forever")


def _parse_busy_poll(text: str) -> int | str:
    if text in _BUSY_POLL_WORDS:
        return text
    try:
        return int(_MICROSECONDS.parse(text))
    except ValueError as error:
        raise ValueError(f"{error}, nor {' or '.join(_BUSY_POLL_WORDS)}") from None


def _check_busy_poll(value: object) -> object:
    return value if value in _BUSY_POLL_WORDS else _MICROSECONDS.check(value)


# ---- the options ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The options of a server, checked. Raises OptionError, which is a ValueError.

    The text below is made from the options themselves.
    """

    host: tuple[str, ...] = option(
        ("127.0.0.1",),
        Option(
            "address or name to listen on, IPv4 or IPv6; may be given again; 0.0.0.0 or :: is "
            "reachable from other hosts",
            _parse_hosts,
            _check_hosts,
            "ADDRESS",
            repeatable=True,
        ),
    )
    port: int = option(12345, integer("TCP port; 0 takes a free one and prints it", 0, 65535))
    uds: str | None = option(
        None,
        Option(
            "Unix stream socket to listen on: instead of TCP, or beside it when --host or "
            "--port is given, too; @NAME is an abstract one, which has no file (./@NAME is a file)",
            str,
            check_uds_path,
            "PATH",
        ),
    )
    uds_mode: int | None = option(
        None,
        Option(
            "permissions of the Unix socket's file, octal; who may write to it may connect; by "
            "default what the umask leaves",
            _parse_mode,
            _MODE.check,
            "MODE",
        ),
    )
    uds_owner: str | None = option(
        None,
        Option(
            "whose the Unix socket's file is, by name or number; :GROUP changes the group alone",
            str,
            _check_owner,
            "USER[:GROUP]",
        ),
    )
    fd: tuple[int, ...] = option(
        (),
        Option(
            "listening socket that was inherited, TCP or Unix: instead of an address, or beside it "
            "when --host or --port is given, too; may be given again; the server accepts from a "
            "duplicate; that the socket does not block, linger, cork or wait for more bytes is set "
            "for whoever else has it, too",
            _parse_fds,
            _check_fds,
            "N",
            repeatable=True,
        ),
    )
    backlog: int = option(
        128,
        integer(
            "connections that may wait to be accepted, on each listener; the kernel truncates "
            "it to net.core.somaxconn",
            0,
            2**31 - 1,
        ),
    )
    dispatch: Dispatch = option(
        "shared",
        choice(
            "shared: one work queue, any thread serves any connection; percpu: one pinned "
            "thread per CPU, which keeps the connections whose packets arrive there",
            "shared",
            "percpu",
        ),
    )
    engine: EngineName = option(
        "epoll",
        choice(
            "epoll: threads echo; io_uring: the same, with fewer system calls, and with shared a "
            "connection stays with the thread that accepted it (Linux 6.1, no busy polling); "
            "auto: io_uring if it is available, else epoll; sockmap, experimental: the kernel "
            "itself echoes TCP, by a BPF program on each connection, and threads only accept and "
            "close; it shares a work queue with the rest of the kernel, so that a busy machine "
            "may stall connections for seconds (root, Linux 6.5)",
            "epoll",
            "io_uring",
            "sockmap",
            "auto",
        ),
    )
    threads: int | None = option(
        None,
        integer(
            "worker threads; by default as many as there are usable CPUs (affinity, cgroup quota)",
            1,
            MOST_THREADS,
            optional=True,
        ),
    )
    busy_poll: BusyPoll = option(
        0,
        Option(
            "microseconds for which a thread goes on looking for events after its last one before "
            "it sleeps; auto: while events come in quick succession, and with a CPU for each "
            "thread; forever: a whole CPU for each thread; 0: it sleeps at once",
            _parse_busy_poll,
            _check_busy_poll,
            "MICROSECONDS|auto|forever",
        ),
    )
    reuse_port: bool = option(
        False, switch("let other server processes listen on the same port (SO_REUSEPORT)")
    )
    public: bool = option(
        False,
        switch(
            "limits for a server that strangers can reach: what is not given otherwise becomes "
            f"{describe_limits(PUBLIC)}; behind a proxy, which all clients share as their address, "
            "give --max-connections-per-ip and --rate-limit, too"
        ),
    )
    max_connections: int | None = option(
        None,
        integer(
            "open connections at most; further clients wait in the accept queue",
            1,
            2**32 - 2,
            optional=True,
        ),
    )
    keepalive: int | None = option(
        None,
        integer(
            "when a TCP client has sent nothing for so many seconds, ask its kernel whether it is "
            "there, five times within as many seconds more (a second apart at least), and close "
            "the connection if none answers (with --write-timeout, after that, too); 0: never; by "
            f"default {DEFAULT_KEEPALIVE_S} where "
            "there is a limit on connections, whose places would be lost to clients that vanished",
            0,
            LONGEST_KEEPALIVE_S,
            "SECONDS",
            optional=True,
        ),
    )
    idle_timeout: float | None = option(
        None,
        seconds("close a connection on which no byte has moved for so many seconds", optional=True),
    )
    write_timeout: float | None = option(
        None,
        seconds(
            "close a client that has not taken a byte of what it was sent for so many seconds; "
            "what its own kernel has acknowledged counts as taken; without it, 60 s once the "
            "client has sent its FIN",
            optional=True,
        ),
    )
    max_buffer_memory: int | None = option(
        None,
        size(
            "bytes that may wait in this process for clients that do not read (K, M, G); beyond "
            "it the slowest of them are reset; under percpu, and with io_uring, each thread has an "
            "equal share; by default 256M, or a quarter of what the cgroup may have, if that is "
            "less",
            1 << 16,
            1 << 62,
            optional=True,
        ),
    )
    socket_memory: int | None = option(
        None,
        size(
            "bytes that the kernel may hold for one TCP connection (K, M, G), half of them "
            "received, half to be sent, headers and all; a stream needs, in each half, twice what "
            "it sends in a round trip; by default the kernel's own sizing, up to tcp_rmem and "
            "tcp_wmem, but a share of half of the cgroup's memory where that is less and there is "
            "--max-connections",
            SOCKET_MEMORY_LEAST,
            1 << 31,
            optional=True,
        ),
    )
    allow: tuple[str, ...] = option(
        (),
        Option(
            "serve these clients, by address or prefix/length, and no others that --deny does not "
            "name more precisely; may be given again",
            parse_prefixes,
            check_prefixes,
            "CIDR",
            repeatable=True,
        ),
    )
    deny: tuple[str, ...] = option(
        (),
        Option(
            "do not serve these clients, unless --allow names them more precisely; may be given "
            "again",
            parse_prefixes,
            check_prefixes,
            "CIDR",
            repeatable=True,
        ),
    )
    max_connections_per_ip: int | None = option(
        None,
        integer(
            "open connections of one client address at most (IPv6: of one /64); further ones are "
            "reset; one that ended counts until the client has acknowledged all of it",
            1,
            2**32 - 2,
            optional=True,
        ),
    )
    rate_limit: int | None = option(
        None,
        integer(
            "new connections a second of one client address at most (IPv6: of one /64), and as "
            "many at once; further ones are reset",
            1,
            1_000_000,
            optional=True,
        ),
    )
    graceful_timeout: float = option(
        5.0,
        seconds(
            "when stopping, for how many seconds to go on echoing what was received", zero=True
        ),
    )

    udp: bool = option(
        False, switch("echo datagrams, too, on the same addresses and port (UDP, RFC 862)")
    )
    udp_rate: int = option(
        10_000,
        integer(
            "datagrams a second that are answered to one source (an IPv4 address, an IPv6 /64, a "
            "link-local address); a tenth of it at once, at least 128; 0: no limit",
            0,
            MOST_DATAGRAMS_PER_S,
        ),
    )
    udp_rate_total: int = option(
        100_000,
        integer(
            "datagrams a second that are answered to all sources together; 0: no limit",
            0,
            MOST_DATAGRAMS_PER_S,
        ),
    )
    udp_rate_repeated: int = option(
        10,
        integer(
            "datagrams a second that one source address and port may send again (the same bytes "
            "within a second) and have all answered, 128 at once; beyond that one in ten is "
            "refused, so that a forged datagram does not go to and fro between two echo servers "
            "for ever: with another kecho server it is answered 68 times at most; with any other "
            "until 193 are answered and 12 more for each second, if it comes round more than 12 "
            "times a second; 0: no limit",
            0,
            MOST_DATAGRAMS_PER_S,
        ),
    )
    udp_min_source_port: int = option(
        1024,
        integer(
            "the lowest source port that is answered: below are services that would answer the "
            "answer",
            1,
            65535,
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in PUBLIC if self.public else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, PUBLIC[name])
        if not self.host and self.uds is None and not self.fd:
            raise OptionError(
                "host",
                "there is no address, no Unix socket and no descriptor to listen on",
            )
        rules_of(self.allow, self.deny)  # they agree with each other
        for name in ("uds_mode", "uds_owner"):
            if getattr(self, name) is not None and self.uds is not None and is_abstract(self.uds):
                raise OptionError(name, f"the abstract socket {self.uds} has no file")
        if self.engine == "io_uring" and self.busy_poll != 0:
            raise OptionError("busy_poll", "the engine io_uring does not poll")
        if self.udp and not self.host:
            raise OptionError(
                "udp", "a Unix socket takes no datagrams, and --fd no UDP: give a host or port"
            )

    @property
    def bounds_clients(self) -> bool:
        """Whether it is limited who may come, how many connections a client has, or for how long
        it may be idle: without any of that, one client can take every place for ever."""
        return bool(self.allow or self.max_connections_per_ip or self.idle_timeout)

    @property
    def keepalive_s(self) -> int:
        """The option keepalive, or what stands for it; 0: the kernel does not ask."""
        if self.keepalive is not None:
            return self.keepalive
        has_limit = self.max_connections is not None or self.max_connections_per_ip is not None
        return DEFAULT_KEEPALIVE_S if has_limit else 0

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> ServerConfig:
        """From the options that somebody gave: the keyword arguments of kecho.Server.

        Beyond the fields it takes ``bench`` (0 is shared, 1 is percpu), and leaves TCP out when
        ``uds`` or ``fd`` is given and neither ``host`` nor ``port``. Raises OptionError, and
        TypeError for an option that does not exist.
        """
        return cls(**check_options(cls, options))


def describe_options() -> str:
    """A line for each option of ServerConfig: name, type, default, what it means."""
    return "\n".join(
        f"    {described.name}: {described.type} = {described.default!r}\n"
        f"        {option_of(described).help}."
        for described in fields(ServerConfig)
    )


ServerConfig.__doc__ = f"{ServerConfig.__doc__}\n{describe_options()}\n"

BENCH = replace(
    integer("1: percpu, 0: shared; the same as --dispatch, in one figure", 0, 1, metavar="0|1"),
    value_if_bare="1",
)
_DISPATCH_OF_BENCH = ("shared", "percpu")


def check_options(
    config_class: type[ServerConfig], options: Mapping[str, object]
) -> dict[str, Any]:
    """The fields of `config_class` that `options` stand for: see ServerConfig.from_options()."""
    given = dict(options)
    unknown = given.keys() - options_of(config_class).keys() - {"bench"}
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    if "bench" in given:
        try:
            dispatch = _DISPATCH_OF_BENCH[BENCH.check(given.pop("bench"))]
        except ValueError as error:
            raise OptionError("bench", str(error)) from None
        if given.setdefault("dispatch", dispatch) != dispatch:
            raise OptionError("bench", f"means dispatch {dispatch}, not {given['dispatch']}")
    elsewhere = given.get("uds") is not None or given.get("fd") not in (None, ())
    if elsewhere and not given.keys() & {"host", "port"}:
        given["host"] = ()
    return given


def check_timeout(name: str, value: object) -> float:
    """A number of seconds that a method takes, checked as the option of that name is."""
    try:
        checked: float = options_of(ServerConfig)[name].check(value)
    except ValueError as error:
        raise OptionError(name, str(error)) from None
    return checked

"""What a run does: each option defined here, once."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal

from ..errors import OptionError
from ..options import (
    Option,
    check_fields,
    check_uds_path,
    choice,
    integer,
    option,
    seconds,
    switch,
)
from ..system.cpus import usable_cpu_count

__all__ = ["Mode", "Workload", "bindable", "link_of"]

Mode = Literal["burst", "closed", "open", "stream", "connect", "idle"]

_DEFAULT_CONNECTIONS = {"burst": 1000, "idle": 1000}
_DEFAULT_THREADS_MOST = 4
_MOST_STAMPS = 1 << 16  # messages of one connection that a client keeps in mind: client.c
_UNLIMITED = 2**32 - 1
_MOST_SOURCES = 4096
_MOST_CPUS = 8191  # CONFIG_NR_CPUS goes no further
_DATAGRAM_BYTES = (16, 65507)  # a header that tells messages apart; what IPv4 carries
_TIMEOUT_S, _TIMEOUT_OF_DATAGRAMS_S = 10.0, 1.0

# What makes no sense in other modes, so that a slip is not taken in silence.
_ONLY_IN = {
    "rate": ("open",),
    "depth": ("closed", "open"),
    "rounds": ("burst",),
    "clear_time_wait": ("burst", "connect"),
    "reconnect": ("closed", "open"),
}


def _check_host(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 253:
        raise ValueError(f"{value!r} is not an address or a name")
    return value


def _parse_rate(text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of messages a second") from None


def _check_rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.01 <= value <= 1e8:
        raise ValueError(f"{value!r} is not between 0.01 and 100000000 messages a second")
    return float(value)


def _check_sources(value: object) -> tuple[str, ...]:
    texts = tuple(value.split(",")) if isinstance(value, str) else value
    if not isinstance(texts, tuple):
        raise ValueError(f"{value!r} is neither an address nor several")
    for text in texts:
        try:
            address, zoned, _ = text.partition("%")
            prefix = ipaddress.ip_network(address, strict=False)
            if zoned:
                ipaddress.IPv6Address(text)
        except ValueError:
            raise ValueError(f"{text!r} is neither an address nor a prefix") from None
        if bool(zoned) != (prefix.version == 6 and prefix.is_link_local):
            raise ValueError(f"{text}: an address of a link, and no other, names it: fe80::1%eth0")
    return texts


def _parse_cpus(text: str) -> tuple[int, ...]:
    """Numbers and ranges parted by commas, as taskset(1) and the kernel write them."""
    found: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(one.isascii() and one.isdigit() for one in ends):
            raise ValueError(f"{part!r} is neither a CPU's number nor a range of them")
        first, last = int(ends[0]), int(ends[-1])
        if not first <= last <= _MOST_CPUS:
            raise ValueError(f"{part!r} is no range of CPUs up to {_MOST_CPUS}")
        found += range(first, last + 1)
    return tuple(found)


def _check_cpus(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise ValueError(f"{value!r} is no tuple of CPU numbers")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= _MOST_CPUS:
            raise ValueError(f"{one!r} is not the number of a CPU")
    return value


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run does, checked. Raises OptionError, which is a ValueError.

    The text below is made from the options themselves.
    """

    host: str = option(
        "127.0.0.1", Option("address or name of the server", str, _check_host, "ADDRESS")
    )
    port: int = option(12345, integer("its port", 1, 65535))
    uds: str | None = option(
        None,
        Option(
            "its Unix stream socket, instead of TCP (@NAME: an abstract one)",
            str,
            check_uds_path,
            "PATH",
        ),
    )
    udp: bool = option(
        False,
        switch(
            "datagrams instead of a stream; closed and open only. What has no reply within "
            "--timeout is lost, and counted"
        ),
    )
    mode: Mode = option(
        "burst",
        choice(
            "burst: all connect at one instant, one message each; closed: the next message "
            "follows the reply; open: messages are due by a schedule; stream: every connection "
            "keeps its pipe full; connect: connect, one echo, close, again; idle: connections are "
            "held",
            *("burst", "closed", "open", "stream", "connect", "idle"),
        ),
    )
    connections: int | None = option(
        None,
        integer(
            "connections at once (by default 1000 in burst and idle, otherwise 50)",
            1,
            1 << 22,
            optional=True,
            letter="c",
        ),
    )
    rounds: int = option(10, integer("bursts, one after the other", 1, 100_000))
    duration: float = option(10.0, seconds("how long, but for burst", letter="d"))
    rate: float | None = option(
        None,
        Option(
            "messages a second, over all connections; open only",
            _parse_rate,
            _check_rate,
            "N",
            letter="R",
        ),
    )
    length: int = option(64, integer("bytes of a message", 1, 1 << 24, "BYTES", letter="l"))
    depth: int | None = option(
        None,
        integer(
            "messages outstanding on a connection, at most (by default 1 in closed, as many as "
            "are due in open)",
            1,
            _MOST_STAMPS,
            optional=True,
        ),
    )
    threads: int | None = option(
        None,
        integer(
            "client threads (by default one for each CPU, at most 4); as many as there are "
            "connections gives each its own",
            1,
            4096,
            optional=True,
        ),
    )
    cpus: tuple[int, ...] = option(
        (),
        Option(
            "CPUs that the client threads are pinned to, in turn, such as 1 or 0,2-3; so that they "
            "stay apart from the server's, or beside it",
            _parse_cpus,
            _check_cpus,
            "LIST",
        ),
    )
    processes: int = option(1, integer("client processes that share the connections", 1, 256))
    warmup: float = option(
        0.0, seconds("how long to load the server before anything is measured", zero=True)
    )
    timeout: float | None = option(
        None,
        seconds(
            "how long to wait for a connection, and for the next byte of a reply (by default 10; "
            "with --udp 1)",
            optional=True,
        ),
    )
    spin: bool = option(
        False, switch("poll without sleeping: the client's own wake-up leaves the figures")
    )
    source: tuple[str, ...] = option(
        (),
        Option(
            "addresses to connect from, in turn: a prefix such as 127.0.0.0/8, or several parted "
            "by commas (fe80::1%eth0 of a link); each has the whole range of ports",
            str,
            _check_sources,
            "ADDRESS",
        ),
    )
    close: str = option("fin", choice("how the client closes", "fin", "rst"))
    reconnect: bool = option(
        False,
        switch(
            "a connection that the server has ended is opened anew, and what it has not answered "
            "sent again; counted, and no error unless it was in the middle of a reply"
        ),
    )
    clear_time_wait: bool = option(
        False,
        switch(
            "root: drop the run's own TIME_WAIT sockets meanwhile (connect) or after each round "
            "(burst), so that it is not limited by ports"
        ),
    )
    line: bool = option(
        False,
        switch("messages are lines, printable and ending in a newline, for servers that read such"),
    )
    verify: bool = option(True, switch("compare every byte of every reply"))
    probe: bool = option(
        True,
        switch(
            "ask by one message whether this is an echo server, before all else: the first of the "
            "first connection, but in burst, connect and UDP, which open one for it"
        ),
    )
    connects_at_once: int = option(
        64, integer("connects under way at once while opening, but for burst", 1, 1 << 22)
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name, modes in _ONLY_IN.items():
            default = next(one.default for one in fields(self) if one.name == name)
            if getattr(self, name) != default and self.mode not in modes:
                raise OptionError(name, f"is for mode {' or '.join(modes)}, not {self.mode}")
        if self.mode == "open" and self.rate is None:
            raise OptionError("rate", "mode open needs a rate")
        if self.udp:
            self._check_udp()
        if self.uds is not None and self.source:
            raise OptionError("source", "a Unix socket has no source addresses")
        connections = self.connections or _DEFAULT_CONNECTIONS.get(self.mode, 50)
        processes = min(self.processes, connections)
        threads = self.threads or min(usable_cpu_count(), _DEFAULT_THREADS_MOST)
        self._settle("connections", connections)
        self._settle("processes", processes)
        self._settle("threads", min(max(threads, processes), connections))
        if self.depth is None and self.mode == "closed":
            self._settle("depth", 1)

        if self.timeout is None:
            self._settle("timeout", _TIMEOUT_OF_DATAGRAMS_S if self.udp else _TIMEOUT_S)

    def _check_udp(self) -> None:
        least, most = _DATAGRAM_BYTES
        if self.mode not in ("closed", "open"):
            raise OptionError("udp", f"is for mode closed or open, not {self.mode}")
        if self.uds is not None:
            raise OptionError("udp", "goes to a host and port, not to a Unix socket")
        for name in ("line", "reconnect"):
            if getattr(self, name):
                raise OptionError(name, "is for a stream, not for datagrams")
        if not least <= self.length <= most:
            raise OptionError("length", f"a datagram has {least} to {most} bytes here")
        if self.close != "fin":
            raise OptionError("close", "UDP has no connection to close")

    def _settle(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def deepest(self) -> int:
        """Messages that may be outstanding on a connection, as the native client takes it."""
        if self.depth is not None:
            return self.depth
        return {"open": _MOST_STAMPS, "stream": _UNLIMITED}.get(self.mode, 1)

    @property
    def timeout_s(self) -> float:
        assert self.timeout is not None
        return self.timeout

    @property
    def total_connections(self) -> int:
        assert self.connections is not None
        return self.connections

    @property
    def total_threads(self) -> int:
        assert self.threads is not None
        return self.threads

    def source_addresses(self) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        """The addresses to connect from, at most 4096 of them; none: the kernel chooses."""
        most = min(_MOST_SOURCES, self.total_connections)
        return list(islice(_hosts(self.source), most if self.mode != "connect" else _MOST_SOURCES))

    def to_dict(self) -> dict[str, Any]:
        values = {described.name: getattr(self, described.name) for described in fields(self)}
        return {**values, "source": list(self.source), "cpus": list(self.cpus)}


def link_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    """The index of a link-local address's link, by its name or number; 0 for others. OSError if
    there is no such link."""
    zone = getattr(address, "scope_id", None)
    if not zone:
        return 0
    try:
        return socket.if_nametoindex(zone)
    except OSError:
        if zone.isascii() and zone.isdigit():
            return int(zone)
        raise OSError(errno.ENODEV, f"there is no link {zone!r}") from None


def bindable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[Any, ...]:
    """What bind(2) takes of it in Python, with any port. OSError if there is no such link."""
    if address.version == 4:
        return (str(address), 0)
    return (str(address).partition("%")[0], 0, 0, link_of(address))


def _hosts(
    specs: tuple[str, ...],
) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """One of each prefix in turn."""
    turn: list[Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]] = [
        iter([ipaddress.IPv6Address(spec)])
        if "%" in spec
        else iter(ipaddress.ip_network(spec, strict=False).hosts())
        for spec in dict.fromkeys(specs)
    ]
    while turn:
        for hosts in list(turn):
            host = next(hosts, None)
            if host is None:
                turn.remove(hosts)
            else:
                yield host


Workload.__doc__ = f"{Workload.__doc__}\n" + "\n".join(
    f"    {one.name}: {one.type} = {one.default!r}\n        {one.metadata['option'].help}."
    for one in fields(Workload)
)

"""Define what a run does: its options, each one once."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice
from textwrap import indent
from typing import Any, Literal

from ..errors import OptionError
from ..options import (
    Option,
    check_fields,
    check_uds_path,
    choice,
    configuration,
    describe_options,
    integer,
    option,
    seconds,
    switch,
)
from ..system.cpus import usable_cpu_count
from .sources import Address, check_sources, hosts_of

__all__ = [
    "CLIENT",
    "LOAD",
    "MODES",
    "REPLIES",
    "TARGET",
    "Mode",
    "Workload",
]

Mode = Literal["burst", "closed", "open", "stream", "connect", "idle"]

MODES = """\
Modes:
  burst    all connect at one instant, send one message each, and close; --rounds times
  closed   the next message follows the reply
  open     messages are due at fixed times, --rate a second
  stream   every connection sends without waiting for replies
  connect  connect, one echo, close, again
  idle     connections are held open and send one message at the end"""

# The headings of --help.
TARGET, LOAD, CLIENT, REPLIES = "Target", "Load", "Client", "Replies"

_DEFAULT_CONNECTIONS = {"burst": 1000, "idle": 1000}
_DEFAULT_THREADS_MOST = 4
_MOST_STAMPS = 1 << 16  # messages of one connection that a client keeps in mind: client.c
_UNLIMITED = 2**32 - 1
_MOST_SOURCES = 4096
_MOST_CPUS = 8191  # CONFIG_NR_CPUS goes no further
_DATAGRAM_BYTES = (16, 65507)  # a header that tells messages apart; what IPv4 carries
_TIMEOUT_S, _TIMEOUT_OF_DATAGRAMS_S = 10.0, 1.0

# Options that apply to some modes only. Elsewhere they are refused, as a likely mistake.
_ONLY_IN = {
    "rate": ("open",),
    "depth": ("closed", "open"),
    "rounds": ("burst",),
    "clear_time_wait": ("burst", "connect"),
    "reconnect": ("closed", "open"),
}


def _check_host(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 253:
        raise ValueError(f"must be an address or a name (got {value!r})")
    return value


def _parse_rate(text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"must be a number of messages a second (got {text!r})") from None


def _check_rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.01 <= value <= 1e8:
        raise ValueError(f"must be between 0.01 and 100000000 messages a second (got {value!r})")
    return float(value)


def _parse_cpus(text: str) -> tuple[int, ...]:
    """Parse numbers and ranges separated by commas, as taskset(1) and the kernel write them."""
    found: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(one.isascii() and one.isdigit() for one in ends):
            raise ValueError(f"must be CPU numbers or ranges, such as 0,2-3 (got {part!r})")
        first, last = int(ends[0]), int(ends[-1])
        if not first <= last <= _MOST_CPUS:
            raise ValueError(f"must be a range of CPUs up to {_MOST_CPUS} (got {part!r})")
        found += range(first, last + 1)
    return tuple(found)


def _check_cpus(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise ValueError(f"must be a tuple of CPU numbers (got {value!r})")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= _MOST_CPUS:
            raise ValueError(f"must be CPU numbers from 0 to {_MOST_CPUS} (got {one!r})")
    return value


@configuration
class Workload:
    """What a run does: options, checked and frozen.

    Workload(mode="closed", ...) raises OptionError (a ValueError) for a wrong value. An option that
    is None gets its default from the others. The options:
    """

    host: str = option(
        Option("Address or name of the server.", str, _check_host, "ADDRESS"),
        TARGET,
        default="127.0.0.1",
    )
    port: int = option(integer("Port of the server.", 1, 65535), TARGET, default=12345)
    uds: str | None = option(
        Option(
            "Unix stream socket of the server, instead of TCP. @NAME is abstract.",
            str,
            check_uds_path,
            "PATH",
        ),
        TARGET,
        default=None,
    )
    udp: bool = option(
        switch(
            "Send datagrams (modes closed and open). One without a reply within --timeout is lost."
        ),
        TARGET,
        default=False,
    )
    mode: Mode = option(
        choice(
            "What the connections do: see below.",
            "burst",
            "closed",
            "open",
            "stream",
            "connect",
            "idle",
        ),
        LOAD,
        default="burst",
    )
    connections: int | None = option(
        integer(
            "Simultaneous connections. Default: 1000 in burst and idle, otherwise 50.",
            1,
            1 << 22,
            optional=True,
            letter="c",
        ),
        LOAD,
        default=None,
    )
    duration: float = option(
        seconds("Time to measure; burst has --rounds instead.", letter="d"), LOAD, default=10.0
    )
    rate: float | None = option(
        Option(
            "Messages a second over all connections, in mode open.",
            _parse_rate,
            _check_rate,
            "N",
            letter="R",
        ),
        LOAD,
        default=None,
    )
    rounds: int = option(
        integer("Bursts, one after the other, in mode burst.", 1, 100_000), LOAD, default=10
    )
    length: int = option(
        integer("Bytes of a message.", 1, 1 << 24, "BYTES", letter="l"), LOAD, default=64
    )
    depth: int | None = option(
        integer(
            "Messages outstanding per connection, at most. Default: 1 in closed, no limit in open.",
            1,
            _MOST_STAMPS,
            optional=True,
        ),
        LOAD,
        default=None,
    )
    warmup: float = option(
        seconds("Time to load the server before measuring.", zero=True), LOAD, default=0.0
    )
    line: bool = option(
        switch("Send printable lines that end in a newline, for servers that read lines."),
        LOAD,
        default=False,
    )
    close: Literal["fin", "rst"] = option(
        choice("How the client closes a connection.", "fin", "rst"), LOAD, default="fin"
    )
    verify: bool = option(
        switch("Compare every byte of every reply (default)."), REPLIES, default=True
    )
    probe: bool = option(
        switch("First send one message to check that the target is an echo server (default)."),
        REPLIES,
        default=True,
    )
    timeout: float | None = option(
        seconds(
            "Longest wait for a connection or the next byte of a reply. Default: 10; UDP: 1.",
            optional=True,
        ),
        REPLIES,
        default=None,
    )
    reconnect: bool = option(
        switch(
            "Reopen a connection that the server has ended, and resend what it has not answered."
        ),
        REPLIES,
        default=False,
    )
    threads: int | None = option(
        integer(
            "Client threads, at most one per connection. Default: one per CPU, at most 4.",
            1,
            4096,
            optional=True,
        ),
        CLIENT,
        default=None,
    )
    processes: int = option(
        integer("Client processes, which share the connections.", 1, 256), CLIENT, default=1
    )
    cpus: tuple[int, ...] = option(
        Option(
            "CPUs to pin the client threads to, in turn, such as 1 or 0,2-3.",
            _parse_cpus,
            _check_cpus,
            "LIST",
        ),
        CLIENT,
        default=(),
    )
    spin: bool = option(
        switch("Poll without sleeping, so that the client's wake-ups are not in the figures."),
        CLIENT,
        default=False,
    )
    source: tuple[str, ...] = option(
        Option(
            "Source addresses, in turn: a prefix such as 127.0.0.0/8, or several with commas.",
            str,
            check_sources,
            "ADDRESS",
        ),
        CLIENT,
        default=(),
    )
    clear_time_wait: bool = option(
        switch("Drop the run's own TIME_WAIT sockets, in modes connect and burst (root)."),
        CLIENT,
        default=False,
    )
    connects_at_once: int = option(
        integer("Connections that open at the same time, except in burst.", 1, 1 << 22),
        CLIENT,
        default=64,
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
            raise OptionError("udp", "needs a host and a port, not a Unix socket")
        for name in ("line", "reconnect"):
            if getattr(self, name):
                raise OptionError(name, "is for a stream, not for datagrams")
        if not least <= self.length <= most:
            raise OptionError(
                "length", f"must be between {least} and {most} with UDP (got {self.length})"
            )
        if self.close != "fin":
            raise OptionError("close", "UDP has no connection to close")

    def _settle(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def deepest(self) -> int:
        """The most messages outstanding on a connection, as the native client takes it."""
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

    def source_addresses(self) -> list[Address]:
        """Return the addresses to connect from, at most 4096. If empty, the kernel chooses."""
        most = min(_MOST_SOURCES, self.total_connections)
        return list(
            islice(hosts_of(self.source), most if self.mode != "connect" else _MOST_SOURCES)
        )

    def to_dict(self) -> dict[str, Any]:
        values = {described.name: getattr(self, described.name) for described in fields(self)}
        return {**values, "source": list(self.source), "cpus": list(self.cpus)}


Workload.__doc__ = f"""{Workload.__doc__}
{describe_options(Workload, indent=4)}

{indent(MODES, "    ")}
    """

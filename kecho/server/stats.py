"""Snapshots of what a server has counted: immutable, they add up and subtract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["AcceptQueue", "Counters", "NamedCounts", "Stats", "UdpCounters"]

_COUNTS = ("accepted", "bytes_received", "bytes_sent", "echoes", "backpressure", "accept_pauses")
_NAMED = ("closed", "errors", "refused")
_UDP_COUNTS = ("received", "sent", "bytes_received", "bytes_sent", "dropped")


class NamedCounts(Mapping[str, int]):
    """Counts by name, immutable: ``stats.closed["eof"]``."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = dict(counts)

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __hash__(self) -> int:
        return hash(frozenset(self._counts.items()))

    def __repr__(self) -> str:
        return repr(self._counts)

    def combine(self, other: NamedCounts, sign: int) -> NamedCounts:
        names = dict.fromkeys([*self, *other])
        return NamedCounts({name: self.get(name, 0) + sign * other.get(name, 0) for name in names})

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self._counts.values())


_NO_COUNTS = NamedCounts({})


@dataclass(frozen=True)
class Counters:
    """What one worker has counted, or several together.

    accepted: connections accepted.
    active: connections open now; of one worker: those it accepted that are still open, whichever
        worker serves them.
    bytes_received, bytes_sent: bytes read from and handed to the kernel.
    echoes: chunks, as recv(2) returned them, that were given back whole.
    backpressure: times the kernel took less than was to be sent, and the rest had to wait.
    accept_pauses: times accepting paused (no descriptors or memory left, or max_connections);
        a retry, ten times a second, that finds no change counts again.
    closed: connections that ended, by reason: ``eof`` (the client ended, all was echoed),
        ``reset`` (by the client), ``timed_out`` (the kernel gave up on the client), ``idle``
        (idle_timeout), ``stalled`` (write_timeout), ``evicted`` (max_buffer_memory), ``drained``
        (the server stopped, all was echoed), ``aborted`` (the server stopped before all was
        echoed; the client saw a reset), ``error``.
    errors: by kind: ``accept`` (a connection that broke before accept returned it),
        ``descriptors`` (EMFILE, ENFILE), ``memory``, ``listener``, ``recv``, ``send``, ``epoll``.
    refused: clients turned away at accept, which are not among `accepted`: ``denied`` (allow,
        deny), ``per_address`` (max_connections_per_ip), ``rate`` (rate_limit).
    """

    accepted: int = 0
    active: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    echoes: int = 0
    backpressure: int = 0
    accept_pauses: int = 0
    closed: NamedCounts = _NO_COUNTS
    errors: NamedCounts = _NO_COUNTS
    refused: NamedCounts = _NO_COUNTS

    def __add__(self, other: Counters) -> Counters:
        return Counters(**_arithmetic(self, other, 1))

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(**_arithmetic(self, earlier, -1))


def _arithmetic(left: Counters, right: Counters, sign: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        name: getattr(left, name) + sign * getattr(right, name) for name in _COUNTS
    }
    # A gauge: of two workers it adds up, over time the later one holds.
    result["active"] = left.active + right.active if sign > 0 else left.active
    for name in _NAMED:
        result[name] = getattr(left, name).combine(getattr(right, name), sign)
    return result


@dataclass(frozen=True)
class AcceptQueue:
    """A listener's accept queue.

    address: as in Server.addresses. dropped: SYNs that found it full since the server started: what
    the socket has dropped (SO_MEMINFO), as far as the network's ListenOverflows bears it out, since
    the socket counts other segments as well, such as those of a load balancer's checks; one that is
    sent again counts again, so these are events, not clients. length:
    connections in it now; length_most: the backlog in force, of which it holds one more. Of a Unix
    socket they are not known, and 0.
    """

    address: Any
    dropped: int
    length: int
    length_most: int

    def __sub__(self, earlier: AcceptQueue) -> AcceptQueue:
        return replace(self, dropped=self.dropped - earlier.dropped)


@dataclass(frozen=True)
class UdpCounters:
    """What has been counted of UDP, in datagrams.

    received, sent, bytes_received, bytes_sent: taken from and handed to the kernel. Each datagram
        received is sent, refused, or in an error other than ``recv``.
    dropped: by the kernel, before they were received: the receive queue was full, the checksum
        wrong, or the server was stopping. They are in no other figure.
    refused: not answered, by reason: ``port`` (source port below udp_min_source_port),
        ``own_port`` (source port is the server's), ``address`` (broadcast, multicast, unspecified
        or reserved on either side), ``denied`` (allow, deny), ``rate`` (udp_rate), ``rate_total``
        (udp_rate_total), ``repeated`` (udp_rate_repeated).
    errors: by kind: ``truncated`` (longer than 64 KiB), ``full`` (no room to send), ``memory``,
        ``unreachable``, ``denied`` (a firewall), ``send``, ``recv``.
    """

    received: int = 0
    sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    dropped: int = 0
    refused: NamedCounts = _NO_COUNTS
    errors: NamedCounts = _NO_COUNTS

    @classmethod
    def of_workers(cls, workers: list[dict[str, Any]]) -> UdpCounters:
        """From what _udp.Echo.counters() returns."""
        total = cls()
        for one in workers:
            named = {name: NamedCounts(one[name]) for name in ("refused", "errors")}
            total = total + cls(**(one | named))
        return total

    def __add__(self, other: UdpCounters) -> UdpCounters:
        return self._combine(other, 1)

    def __sub__(self, earlier: UdpCounters) -> UdpCounters:
        return self._combine(earlier, -1)

    def _combine(self, other: UdpCounters, sign: int) -> UdpCounters:
        return UdpCounters(
            **{name: getattr(self, name) + sign * getattr(other, name) for name in _UDP_COUNTS},
            refused=self.refused.combine(other.refused, sign),
            errors=self.errors.combine(other.errors, sign),
        )

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {name: getattr(self, name) for name in _UDP_COUNTS}
        return {**plain, "refused": dict(self.refused), "errors": dict(self.errors)}


@dataclass(frozen=True)
class Stats(Counters):
    """The counters of all workers together, and of each.

    seconds: how long the server has been running, or ran.
    workers: the counters of each worker, in the order of their indices.
    accept_queues: of each listener; under percpu a TCP address has one for each worker.
    udp: what UDP has counted; None when it is off. The others count TCP and Unix sockets alone.

    ``later - earlier`` is what happened between two snapshots of the same run, `seconds` its
    length; `active` is then the later one's.
    """

    seconds: float = 0.0
    workers: tuple[Counters, ...] = ()
    accept_queues: tuple[AcceptQueue, ...] = ()
    udp: UdpCounters | None = None

    @property
    def dropped_syns(self) -> int:
        """By all listeners together."""
        return sum(one.dropped for one in self.accept_queues)

    @classmethod
    def of_workers(
        cls,
        workers: list[dict[str, Any]],
        seconds: float,
        accept_queues: tuple[AcceptQueue, ...] = (),
        udp: list[dict[str, Any]] | None = None,
    ) -> Stats:
        """From what the engine's counters() returns, and _udp.Echo's if there is one."""
        parts = tuple(map(_from_engine, workers))
        total = Counters()
        for part in parts:
            total = total + part
        return cls(
            **vars(total),
            seconds=seconds,
            workers=parts,
            accept_queues=accept_queues,
            udp=None if udp is None else UdpCounters.of_workers(udp),
        )

    def __sub__(self, earlier: Counters) -> Stats:
        if not isinstance(earlier, Stats) or len(self.workers) != len(earlier.workers):
            raise ValueError("only snapshots of the same run can be subtracted")
        return Stats(
            **_arithmetic(self, earlier, -1),
            seconds=self.seconds - earlier.seconds,
            workers=tuple(
                mine - theirs for mine, theirs in zip(self.workers, earlier.workers, strict=True)
            ),
            accept_queues=tuple(
                mine - theirs
                for mine, theirs in zip(self.accept_queues, earlier.accept_queues, strict=True)
            ),
            udp=self.udp - earlier.udp if self.udp and earlier.udp else self.udp,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        plain = _plain(self)
        plain["seconds"] = self.seconds
        plain["workers"] = [_plain(worker) for worker in self.workers]
        plain["accept_queues"] = [vars(one) for one in self.accept_queues]
        plain["udp"] = None if self.udp is None else self.udp.to_dict()
        return plain


def _from_engine(counted: dict[str, Any]) -> Counters:
    named = {name: NamedCounts(counted[name]) for name in _NAMED}
    return Counters(**(counted | named))


def _plain(counters: Counters) -> dict[str, Any]:
    plain: dict[str, Any] = {name: getattr(counters, name) for name in _COUNTS}
    plain["active"] = counters.active
    for name in _NAMED:
        plain[name] = dict(getattr(counters, name))
    return plain

"""Which sockets are meant: by state, address, port, family, user and process."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .pairs import canonical, parse_port, shortened
from .states import NAMES, parse_state

if TYPE_CHECKING:
    from .sockets import Socket

__all__ = ["Filter", "Range", "parse_range"]


@dataclass(frozen=True)
class Range:
    """Addresses and ports of one end. network: None is any address."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    low_port: int = 0
    high_port: int = 65535

    @property
    def narrows(self) -> bool:
        """It leaves out more than the other family of addresses, as a prefix of length 0 does."""
        every_port = self.low_port <= 1 and self.high_port == 65535
        return not every_port or (self.network is not None and self.network.prefixlen > 0)

    def holds(self, address: str, port: int) -> bool:
        if not self.low_port <= port <= self.high_port:
            return False
        return self.network is None or ipaddress.ip_address(address) in self.network


def _parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    if text in ("", "*"):  # before a port
        return None
    address, slash, length = text.partition("/")
    address = canonical(address)
    if not slash:
        return ipaddress.ip_network(address)
    most = 128 if ":" in address else 32
    digits = length.isascii() and length.isdigit() and len(length) <= 3
    if not digits or int(length) > most or ("." in address and ":" in text):
        raise ValueError(f"{shortened(length)} is not the length of a prefix of {text[:60]}")
    try:
        return ipaddress.ip_network(f"{address}/{int(length)}")
    except ValueError:
        raise ValueError(f"{shortened(text)} has bits set behind its prefix") from None


def parse_range(text: str) -> Range:
    """ADDRESS, PREFIX/LENGTH, PORT, :PORT, :LOW-HIGH, ADDRESS:PORT, [IPV6]:PORT. ValueError."""
    if not text:
        raise ValueError("an address or a port is needed")
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        if rest.startswith("/"):
            length, colon, port = rest.partition(":")
            inside, rest = inside + length, colon + port
        if not bracket or ":" not in inside or (rest and not rest.startswith(":")):
            raise ValueError(f"{shortened(text)} is not [IPV6]:PORT")
        address, ports = inside, rest[1:] if rest else None
    elif text.count(":") > 1:
        # Where the address ends and the port begins would be a guess.
        address, ports = text, None
    elif ":" in text:
        address, _, ports = text.partition(":")
    elif text.replace("-", "").isdigit():
        address, ports = "", text
    else:
        address, ports = text, None
    if ports is None and address == "*":
        raise ValueError("'*' is everything: an address or a port is needed")
    network = _parse_network(address)
    if ports is None:
        return Range(network)
    low, dash, high = ports.partition("-")
    first = parse_port(low)
    last = parse_port(high) if dash else first
    if last < first:
        raise ValueError(f"{ports} is not a range of ports")
    return Range(network, first, last)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """All that is given must hold; of several values for one thing, any.

    inodes: of the processes that were asked for.
    """

    states: frozenset[str] = frozenset()
    local: tuple[Range, ...] = ()
    peer: tuple[Range, ...] = ()
    family: int | None = None  # 4 or 6; v4-mapped counts as 4
    uids: frozenset[int] = frozenset()
    inodes: frozenset[int] | None = None

    @property
    def is_empty(self) -> bool:
        return self == Filter()

    @property
    def narrows(self) -> bool:
        """Enough to drop by. Half of all connections, a family, is nearly "everything"."""
        return (
            bool(self.states or self.uids or self.inodes is not None)
            or (bool(self.local) and all(one.narrows for one in self.local))
            or (bool(self.peer) and all(one.narrows for one in self.peer))
        )

    def matches(self, socket: Socket) -> bool:
        if self.states and socket.state not in self.states:
            return False
        if self.family and (6 if ":" in socket.local_address else 4) != self.family:
            return False
        if self.uids and socket.owner not in self.uids:
            return False
        if self.inodes is not None and (not socket.inode or socket.inode not in self.inodes):
            return False
        if self.local and not any(
            one.holds(socket.local_address, socket.local_port) for one in self.local
        ):
            return False
        return not self.peer or any(
            one.holds(socket.peer_address, socket.peer_port) for one in self.peer
        )

    def mask(self, listeners: bool) -> int:
        """For the kernel: 1 << state for each that may match."""
        wanted = self.states or frozenset(NAMES.values()) - {"close"}
        mask = sum(1 << number for number, name in NAMES.items() if name in wanted)
        if mask & 1 << 3:
            mask |= 1 << 12  # TCP_NEW_SYN_RECV, which newer kernels ask for by itself
        return mask if listeners else mask & ~(1 << 10)

    def ports(self) -> tuple[int, int]:
        """(local, peer): a single port, which the kernel then filters by; 0 is any."""
        return _single(self.local), _single(self.peer)


def _single(ranges: tuple[Range, ...]) -> int:
    ports = {(one.low_port, one.high_port) for one in ranges}
    if len(ports) == 1:
        low, high = ports.pop()
        if low == high:
            return low
    return 0


def make_filter(
    *,
    states: Iterable[str] = (),
    local: Iterable[str | Range] = (),
    peer: Iterable[str | Range] = (),
    family: int | None = None,
    uids: Iterable[int] = (),
    inodes: Iterable[int] | None = None,
) -> Filter:
    """A Filter of texts. Raises ValueError."""
    return Filter(
        states=frozenset(name for text in _several(states) for name in parse_state(text)),
        local=tuple(one if isinstance(one, Range) else parse_range(one) for one in _several(local)),
        peer=tuple(one if isinstance(one, Range) else parse_range(one) for one in _several(peer)),
        family=family,
        uids=frozenset([uids] if isinstance(uids, int) else uids),
        inodes=None if inodes is None else frozenset(inodes),
    )


def _several(values: Any) -> Iterable[Any]:
    return [values] if isinstance(values, (str, Range)) else values

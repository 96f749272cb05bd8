"""Addresses and ports of one end of a connection: as text, and many of them looked up at once."""

from __future__ import annotations

import ipaddress
import socket
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .pairs import canonical, parse_port, shortened

__all__ = ["Range", "Ranges", "parse_range"]


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


class _Ports:
    """Ranges of ports, each of which may overlap others."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        for low, high in sorted(ranges):
            if self._highs and low <= self._highs[-1] + 1:
                self._highs[-1] = max(self._highs[-1], high)
            else:
                self._lows.append(low)
                self._highs.append(high)

    def __contains__(self, port: int) -> bool:
        at = bisect_right(self._lows, port) - 1
        return at >= 0 and port <= self._highs[at]


class Ranges:
    """Whether any of the ranges holds an end; it takes a look for each length of a prefix in use,
    however many ranges there are."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        anywhere: list[tuple[int, int]] = []
        # By family, by the bits behind the prefix, by the prefix.
        at: dict[bool, dict[int, dict[int, list[tuple[int, int]]]]]
        at = {is_v6: defaultdict(lambda: defaultdict(list)) for is_v6 in (False, True)}
        for one in ranges:
            ports = (one.low_port, one.high_port)
            if one.network is None:
                anywhere.append(ports)
            else:
                rest = one.network.max_prefixlen - one.network.prefixlen
                prefix = int(one.network.network_address) >> rest
                at[one.network.version == 6][rest][prefix].append(ports)
        self._anywhere = _Ports(anywhere) if anywhere else ()
        self._by_prefix = {
            is_v6: [
                (rest, {prefix: _Ports(ports) for prefix, ports in by_prefix.items()})
                for rest, by_prefix in by_rest.items()
            ]
            for is_v6, by_rest in at.items()
        }

    def holds(self, address: str, port: int) -> bool:
        """address: canonical."""
        if port in self._anywhere:
            return True
        is_v6 = ":" in address
        by_prefix = self._by_prefix[is_v6]
        if not by_prefix:
            return False
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        number = int.from_bytes(socket.inet_pton(family, address), "big")
        for rest, ports_of in by_prefix:
            ports = ports_of.get(number >> rest)
            if ports is not None and port in ports:
                return True
        return False


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


@lru_cache(1 << 14)  # the command checks each of its options twice before it uses it
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

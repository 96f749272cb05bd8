"""Addresses and ports of one end of a connection: as text, and many of them looked up at once."""

from __future__ import annotations

import ipaddress
import socket
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from .devices import check_name
from .pairs import canonical, parse_port, shortened

__all__ = ["IndexOf", "Range", "Ranges", "parse_range"]

IndexOf = Callable[[str], int | None]  # Devices.index()


@dataclass(frozen=True)
class Range:
    """Addresses and ports of one end. network: None is any address; scope: the device that the
    socket is bound to, as Devices.index() takes it, or empty for any and none."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    low_port: int = 0
    high_port: int = 65535
    scope: str = ""

    @property
    def narrows(self) -> bool:
        """It leaves out more than the other family of addresses, as a prefix of length 0 does."""
        every_port = self.low_port <= 1 and self.high_port == 65535
        some_addresses = self.network is not None and self.network.prefixlen > 0
        return bool(self.scope) or not every_port or some_addresses


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
    """Whether any of the ranges holds an end of a socket; it takes a look for each length of a
    prefix in use, however many ranges there are."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        anywhere: list[tuple[int, int]] = []
        # By family, by the bits behind the prefix, by the prefix.
        at: dict[bool, dict[int, dict[int, list[tuple[int, int]]]]]
        at = {is_v6: defaultdict(lambda: defaultdict(list)) for is_v6 in (False, True)}
        scoped: dict[str, list[Range]] = defaultdict(list)
        for one in ranges:
            if one.scope:
                scoped[one.scope].append(replace(one, scope=""))
                continue
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
        self._scoped = {scope: Ranges(several) for scope, several in scoped.items()}

    def hold(self, address: str, port: int, device: int, index_of: IndexOf) -> bool:
        """address: canonical; device: the index of the one that the socket is bound to, or 0."""
        if self._hold_anywhere(address, port):
            return True
        return device != 0 and any(
            index_of(scope) == device and ranges._hold_anywhere(address, port)
            for scope, ranges in self._scoped.items()
        )

    def _hold_anywhere(self, address: str, port: int) -> bool:
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
        raise ValueError(f"{shortened(text)} has host bits set") from None


def _parse_scoped(text: str) -> Range:
    address, _, rest = text.partition("%")
    # A name holds neither of the two, but it may hold brackets.
    end = min((at for at in (rest.find("/"), rest.find(":")) if at >= 0), default=len(rest))
    scope, rest = rest[:end], rest[end:]
    if "%" in rest:
        raise ValueError(f"{shortened(text)} names more than one device")
    if address.startswith("[") and "]" not in address:
        if not scope.endswith("]"):
            raise ValueError(f"{shortened(text)} is not [IPV6%DEVICE]:PORT")
        address, scope = address + "]", scope[:-1]
    check_name(scope)
    if not rest.startswith("/") and ":" in address and not address.startswith("["):
        address = f"[{address}]"
    if address + rest in ("", "*"):
        return Range(None, scope=scope)
    return replace(parse_range(address + rest), scope=scope)


@lru_cache(1 << 14)  # the command checks each of its options twice before it uses it
def parse_range(text: str) -> Range:
    """ADDRESS, PREFIX/LENGTH, PORT, :PORT, :LOW-HIGH, ADDRESS:PORT, [IPV6]:PORT; also over a
    device, ADDRESS%DEVICE, or with that alone: %DEVICE, %DEVICE:PORT. Raises ValueError."""
    if "%" in text:
        return _parse_scoped(text)
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

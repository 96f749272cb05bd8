"""Define the source addresses of the client: their text, the hosts of a prefix, their links."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

__all__ = ["Address", "bindable", "check_sources", "hosts_of", "link_of"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_sources(value: object) -> tuple[str, ...]:
    """Return the addresses and prefixes, each checked. Raises ValueError."""
    texts = tuple(value.split(",")) if isinstance(value, str) else value
    if not isinstance(texts, tuple):
        raise ValueError(f"must be an address or several (got {value!r})")
    for text in texts:
        try:
            address, zoned, _ = text.partition("%")
            prefix = ipaddress.ip_network(address, strict=False)
            if zoned:
                ipaddress.IPv6Address(text)
        except ValueError:
            raise ValueError(f"must be an address or a prefix (got {text!r})") from None
        if bool(zoned) != (prefix.version == 6 and prefix.is_link_local):
            raise ValueError(
                f"must name a link if link-local, as fe80::1%eth0, else none (got {text!r})"
            )
    return texts


def link_of(address: Address) -> int:
    """Return the index of a link-local address's link, which has a name or a number; 0 for other
    addresses. Raises OSError if there is no such link."""
    zone = getattr(address, "scope_id", None)
    if not zone:
        return 0
    try:
        return socket.if_nametoindex(zone)
    except OSError:
        if zone.isascii() and zone.isdigit():
            return int(zone)
        raise OSError(errno.ENODEV, f"there is no link {zone!r}") from None


def bindable(address: Address) -> tuple[Any, ...]:
    """Return what bind(2) takes in Python for an address and any port. Raises OSError if there is
    no such link."""
    if address.version == 4:
        return (str(address), 0)
    return (str(address).partition("%")[0], 0, 0, link_of(address))


def hosts_of(specs: tuple[str, ...]) -> Iterator[Address]:
    """Return the hosts of the prefixes, one of each prefix in turn."""
    turn: list[Iterator[Address]] = [
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

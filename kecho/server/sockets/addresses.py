"""Where to listen: hosts to addresses, and addresses to text."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...errors import ListenError
from ...system.names import look_up

__all__ = ["Address", "Target", "describe_addresses", "resolve"]

Address = tuple[str, int] | tuple[str, int, int, int] | str

_links: dict[int, str] = {}  # by index, as last heard


def describe_addresses(addresses: tuple[Address, ...], protocol: str = "tcp") -> str:
    """As ``tcp 127.0.0.1:12345, tcp [fe80::1%eth0]:12345, unix /run/kecho``."""
    return ", ".join(_describe_address(one, protocol) for one in addresses) or "(not started)"


def _describe_address(address: Address, protocol: str) -> str:
    if isinstance(address, str):
        return f"unix {address}"
    return f"{protocol} {_host_and_port(address)}"


def _host_and_port(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host = address[0]
    if ":" not in host:
        return f"{host}:{address[1]}"
    if len(address) == 4 and address[3] and "%" not in host:
        host += f"%{_link(address[3])}"
    return f"[{host}]:{address[1]}"


def _link(index: int) -> str:
    """The name of a device, by its index. In the sandbox nobody can ask, but a server has been
    described before."""
    with suppress(OSError):
        _links[index] = socket.if_indextoname(index)
    return _links.get(index, str(index))


@dataclass(frozen=True)
class Target:
    """One address to listen on."""

    family: int
    sockaddr: tuple[str, int] | tuple[str, int, int, int]

    def with_port(self, port: int) -> Target:
        address = self.sockaddr
        return Target(self.family, (address[0], port, *address[2:]))

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.sockaddr[0].partition("%")[0]).is_loopback

    def __str__(self) -> str:
        return _host_and_port(self.sockaddr)


def resolve(hosts: Sequence[str], port: int) -> dict[Target, list[str]]:
    """The addresses, without repeats, and the hosts that stand for each. Raises ListenError."""
    targets: dict[Target, list[str]] = {}
    for host in hosts:
        try:
            found = look_up(_without_brackets(host), port, socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            number = error.errno if isinstance(error, OSError) else None
            reason = error.strerror if isinstance(error, OSError) else "not a name"
            reason = f"{host!r} cannot be resolved: {reason}{_advice(host)}"
            raise ListenError("host", number, reason) from None
        for family, _, _, _, sockaddr in found:
            if family in (socket.AF_INET, socket.AF_INET6):
                target = Target(family, sockaddr)
                _check(host, target)
                targets.setdefault(target, []).append(host)
    return targets


def _without_brackets(host: str) -> str:
    """As URLs and `ss` write IPv6 addresses."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") and ":" in host else host


def _advice(host: str) -> str:
    if re.fullmatch(r"(\[.*\]|[^:]*):\d+", host):
        return "; the port is an option of its own"
    _, has_link, link = host.strip("[]").partition("%")
    with suppress(OSError):
        if has_link and link not in {name for _, name in socket.if_nameindex()}:
            return f"; there is no network device {link!r}"
    return ""


def _check(host: str, target: Target) -> None:
    """That it can be bound, other things being equal. Raises ListenError."""
    if target.family != socket.AF_INET6:
        return
    address = ipaddress.IPv6Address(target.sockaddr[0].partition("%")[0])
    if address.ipv4_mapped is not None:
        reason = f"{host!r} is an IPv4 address in an IPv6 form: {address.ipv4_mapped} is the same"
    elif address.is_link_local and target.sockaddr[3:] == (0,):
        reason = f"{host!r} is an address of a link, which has to be named: {address}%DEVICE"
    else:
        return
    raise ListenError("host", errno.EINVAL, reason)

"""Which clients are served: --allow and --deny, prefixes to the engine's rules."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from ..errors import OptionError

__all__ = ["Rule", "check_prefixes", "parse_prefixes", "rules_of"]

Rule = tuple[int, int, bool]  # the prefix as an IPv6 address, its length of 128, is_allowed
_V4_IN_V6 = 0xFFFF << 32  # ::ffff:0:0/96
_V4_BITS_BEFORE = 96
_MOST_RULES = 100_000


def parse_prefixes(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def check_prefixes(value: object) -> tuple[str, ...]:
    """The prefixes in canonical form, without repeats. Raises ValueError."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise ValueError(f"must be a prefix or several (got {value!r})")
    found = dict.fromkeys(str(_network(one)) for one in value)
    if len(found) > _MOST_RULES:
        raise ValueError(f"must be at most {_MOST_RULES:,} prefixes (got {len(found):,})")
    return tuple(found)


def _network(text: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(text, str) and "%" in text:
        raise ValueError(
            f"must be an address without a link; filter interfaces in a firewall (got {text!r})"
        )
    try:
        if not isinstance(text, str):
            raise ValueError
        network = ipaddress.ip_network(text)
    except ValueError as error:
        hint = ": it has host bits set" if "host bits" in str(error) else ""
        raise ValueError(f"must be an address or prefix/length (got {text!r}{hint})") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= _V4_BITS_BEFORE:
        return ipaddress.ip_network((mapped, network.prefixlen - _V4_BITS_BEFORE))
    return network


def _place(text: str) -> tuple[int, int]:
    """The prefix as an IPv6 address, and its length of 128."""
    network = ipaddress.ip_network(text)
    number = int(network.network_address)
    if network.version == 6:
        return number, network.prefixlen
    return number | _V4_IN_V6, network.prefixlen + _V4_BITS_BEFORE


def rules_of(allow: tuple[str, ...], deny: tuple[str, ...]) -> list[Rule]:
    """The most specific first. OptionError for a prefix that is both allowed and denied, however
    it is written."""
    decided = {_place(one): True for one in allow}
    for one in deny:
        if decided.setdefault(_place(one), False):
            raise OptionError("deny", f"must not repeat a prefix of allow (got {one})")
    rules = [(number, length, is_allowed) for (number, length), is_allowed in decided.items()]
    return sorted(rules, key=lambda rule: (-rule[1], rule[0]))

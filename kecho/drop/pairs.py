"""Text to pairs of addresses, as netstat and ss print them: local first, then peer."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .devices import as_name, check_name
from .lines import ends_of, has_program, is_header, is_rest_of_ss

__all__ = ["Endpoint", "Pair", "PairError", "as_pair", "pairs_in", "parse_pair", "parse_pairs"]

LONGEST_LINE = 65536  # ss names all processes that hold a socket
UNSPECIFIED = ("0.0.0.0", "::")
# Not within a word: a device may be called "a#b".
COMMENT = re.compile(r"[ \t]#(?:[ \t].*)?$")


class PairError(ValueError):
    """A line that is no pair. line: its number, from 1; 0 when there are no lines."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple[type[PairError], tuple[int, str]]:
        return type(self), (self.line, self.reason)


class Endpoint(NamedTuple):
    """One end. address: canonical, IPv4 also where the kernel shows it as v4-mapped; port: 0 is
    the peer of a listener; scope: a device as Devices.index() takes it, or empty."""

    address: str
    port: int
    scope: str = ""

    def __str__(self) -> str:
        address = f"{self.address}%{self.scope}" if self.scope else self.address
        return f"{f'[{address}]' if ':' in address else address}:{self.port or '*'}"


class Pair(NamedTuple):
    """One connection as one of its ends has it: who is local decides which end is dropped."""

    local: Endpoint
    peer: Endpoint

    def __str__(self) -> str:
        return f"{self.local} {self.peer}"


def canonical(address: str) -> str:
    """An address as inet_ntop(3) writes it, v4-mapped as IPv4. Raises ValueError."""
    if not address.isascii() or "\0" in address:
        raise ValueError(f"{shortened(address)} is not an address")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        packed = socket.inet_pton(family, address)
    except OSError:
        raise ValueError(f"{shortened(address)} is not an address") from None
    if len(packed) == 16 and packed.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(family, packed)


def shortened(text: str) -> str:
    return ascii(text) if len(text) <= 60 else f"{text[:50]!a}…"


def parse_port(text: str) -> int:
    """1 to 65535. Raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise ValueError(f"{shortened(text)} is not a port: 1 to 65535, as netstat -n prints it")
    return int(text)


def split_scope(address: str) -> tuple[str, str]:
    address, percent, scope = address.partition("%")
    return address, check_name(scope) if percent else ""


def _unbracketed(text: str) -> str:
    """[ADDRESS], [ADDRESS]%SCOPE or [ADDRESS%SCOPE] without the brackets; a scope may hold some."""
    inside, percent, scope = text[1:].partition("%")
    address, bracket, rest = inside.partition("]")
    if not bracket:
        scope, bracket, rest = scope[:-1], scope[-1:], ""
    if bracket != "]" or rest:
        raise ValueError
    return address + percent + scope


def parse_endpoint(text: str, *, peer: bool = False) -> Endpoint:
    """``127.0.0.1:80``, ``[::1]:80``, ``::1:80``; an interface stands behind %, as ss prints it.

    peer: ``0.0.0.0:*``, ``[::]:*`` and ``*:*``, a listener's peer, are taken as well.
    """
    address, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{shortened(text)} has no port")
    is_bracketed = address.startswith("[")
    if is_bracketed:
        try:
            address = _unbracketed(address)
        except ValueError:
            raise ValueError(f"{shortened(text)} is not [ADDRESS]:PORT") from None
    address, scope = split_scope(address)
    if is_bracketed and ":" not in address:
        raise ValueError(f"{shortened(address)} is not an IPv6 address")
    is_bare_v6 = ":" in address and not is_bracketed
    try:
        address = "::" if address == "*" else canonical(address)
    except ValueError as error:
        hint = "; if netstat cut it short: netstat -W" if is_bare_v6 else ""
        raise ValueError(f"{error}{hint}") from None
    if peer and port == "*" and address in UNSPECIFIED:
        return Endpoint(address, 0, scope)
    return Endpoint(address, parse_port(port), scope)


def make_pair(local: Endpoint, peer: Endpoint) -> Pair:
    if (":" in local.address) != (":" in peer.address):
        raise ValueError(f"{local} and {peer} are of different families")
    return Pair(local, peer)


def parse_pair(text: str) -> Pair:
    """``LOCAL PEER``, or a line that holds them as ss, netstat -n, lsof -nP or /proc/net/tcp print
    it. Raises ValueError."""
    if len(text) > LONGEST_LINE:
        raise ValueError(f"{len(text):,} characters, {LONGEST_LINE:,} at most: {shortened(text)}")
    if "\0" in text:
        raise ValueError("a NUL character")
    words = text.replace("\t", " ").split(" ")
    words = [word for word in words if word]
    ends = ends_of(text.strip(" \t")) or (tuple(words) if len(words) == 2 else None)
    if ends is None:
        raise ValueError(
            f"two addresses are needed, the local one and the peer's, not {len(words)} words, or a"
            f" line of ss, netstat, lsof or /proc/net/tcp: {shortened(text)}"
        )
    return make_pair(parse_endpoint(ends[0]), parse_endpoint(ends[1], peer=True))


def _lines(text: str | bytes) -> Iterator[str]:
    """One after the other: a list of all may need a hundred times the memory of the text."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin) if isinstance(text, str) else text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        line = text[begin:end]
        yield line if isinstance(line, str) else as_name(line)
        begin = end + 1


def pairs_in(lines: Iterable[str]) -> Iterator[Pair]:
    """Of lines as parse_pairs() takes them, as they come. Raises PairError at a wrong one."""
    are_programs_named = False  # by netstat -p
    for number, line in enumerate(lines, 1):
        try:
            line = _without_comment(line.removesuffix("\r").strip(" \t"))
            if not line or is_header(line):
                continue
            pair = parse_pair(line)
            if has_program(line):
                are_programs_named = True
            elif are_programs_named:
                raise ValueError(
                    "no line of netstat -p, as one before: it may be the rest of a program's name."
                    " netstat -tn prints no names"
                )
            yield pair
        except ValueError as error:
            raise PairError(number, str(error)) from None


def _without_comment(line: str) -> str:
    """Raises ValueError for what may be no comment: names of processes hold "#" as well."""
    if "\0" in line:
        raise ValueError("a NUL character")
    if "#" not in line:
        return line
    ends = ends_of(line) if len(line) <= LONGEST_LINE else None
    if line.startswith("#"):
        if ends is not None and not ends[0].startswith("#"):
            raise ValueError(
                'a line of lsof of a command whose name begins with "#"; a comment needs "# "'
            )
        return ""
    if ends is None and (found := COMMENT.search(line)):
        if is_rest_of_ss(found[0]):
            raise ValueError("the rest of the name of a process: ss -tn prints no names")
        return line[: found.start()].rstrip(" \t")
    return line


def parse_pairs(text: str | bytes) -> list[Pair]:
    """The pairs in lines as parse_pair() takes them; headers, blank lines and # comments are
    skipped.

    Each pair comes once. Raises PairError, which names the first wrong line: then there is none.
    """
    return list(dict.fromkeys(pairs_in(_lines(text))))


def may_be_cut(pair: Pair) -> bool:
    """An end fills the column of netstat, which cuts an address short that does not fit: 22
    characters and a colon (net-tools 2.10, addr_do_one())."""
    return any(":" in one.address and len(f"{one.address}:{one.port}") == 23 for one in pair)


def as_pair(value: Pair | Sequence[object] | str) -> Pair:
    """A Pair, (local address, local port, peer address, peer port), or text. Raises PairError."""
    try:
        if isinstance(value, str):
            return parse_pair(value)
        if isinstance(value, Pair):
            return make_pair(*(_check_end(*end) for end in value))
        local, local_port, peer, peer_port = value
        return make_pair(_check_end(local, local_port), _check_end(peer, peer_port))
    except (TypeError, ValueError) as error:
        raise PairError(0, str(error)) from None


def _check_end(address: object, port: object, scope: str = "") -> Endpoint:
    if not isinstance(address, str):
        raise ValueError(f"{address!r} is not an address")
    bare, percent, named = address.partition("%")
    text = canonical(bare)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
        raise ValueError(f"{port!r} is not a port")
    if port == 0 and text not in UNSPECIFIED:
        raise ValueError("0 is not a port")
    split_scope(f"{bare}%{scope or named}" if scope or percent else bare)
    return Endpoint(text, port, scope or named)


def as_pairs(values: Iterable[Pair | Sequence[object] | str]) -> list[Pair]:
    return list(dict.fromkeys(as_pair(value) for value in values))

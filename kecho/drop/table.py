"""Many pairs in little memory."""

from __future__ import annotations

import socket
import struct
from array import array
from collections.abc import Collection, Iterable, Iterator

from .devices import as_name
from .pairs import Endpoint, Pair

__all__ = ["PairTable"]

# The version of IP, and of each end its address and port.
_FAMILIES = {
    4: (socket.AF_INET, struct.Struct("!B4sH4sH")),
    6: (socket.AF_INET6, struct.Struct("!B16sH16sH")),
}
_FIRST_SLOTS = 1024


class PairTable(Collection[Pair]):
    """Each pair once, in the order in which they came: 33 bytes each at most, 57 of IPv6, and
    the names of devices. (A Pair takes some 500.) While it grows, it may take half as much again.
    """

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        self._records = bytearray()
        self._ends = array("I")  # of each record
        # A hash table of the numbers of records, from 1; 0 is a free slot. At most half are taken.
        self._slots = array("I", [0]) * _FIRST_SLOTS
        for pair in pairs:
            self.add(pair)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Pair]:
        for number in range(len(self._ends)):
            yield _unpacked(self._record(number))

    def __contains__(self, pair: object) -> bool:
        return isinstance(pair, Pair) and self._slots[self._slot(_packed(pair))] != 0

    def add(self, pair: Pair) -> None:
        record = _packed(pair)
        at = self._slot(record)
        if self._slots[at]:
            return
        self._records += record
        self._ends.append(len(self._records))
        self._slots[at] = len(self._ends)
        if 2 * len(self._ends) > len(self._slots):
            self._double()

    def _record(self, number: int) -> bytes:
        begin = self._ends[number - 1] if number else 0
        return bytes(self._records[begin : self._ends[number]])

    def _slot(self, record: bytes) -> int:
        """Where it is, or the free one where it belongs."""
        last = len(self._slots) - 1
        at = hash(record) & last
        while (number := self._slots[at]) and self._record(number - 1) != record:
            at = (at + 1) & last
        return at

    def _double(self) -> None:
        self._slots = array("I", [0]) * (2 * len(self._slots))
        last = len(self._slots) - 1
        for number in range(len(self._ends)):
            at = hash(self._record(number)) & last
            while self._slots[at]:
                at = (at + 1) & last
            self._slots[at] = number + 1


def _packed(pair: Pair) -> bytes:
    version = 6 if ":" in pair.local.address else 4
    family, form = _FAMILIES[version]
    local, peer = pair
    ends = (
        socket.inet_pton(family, local.address), local.port,
        socket.inet_pton(family, peer.address), peer.port,
    )  # fmt: skip
    packed = form.pack(version, *ends)
    if not local.scope and not peer.scope:
        return packed
    names = [one.scope.encode("utf-8", "surrogateescape") for one in pair]
    return packed + bytes([len(names[0])]) + names[0] + names[1]


def _unpacked(record: bytes) -> Pair:
    family, form = _FAMILIES[record[0]]
    _, local, local_port, peer, peer_port = form.unpack_from(record)
    scopes = "", ""
    if len(record) > form.size:
        begin = form.size + 1
        end = begin + record[form.size]
        scopes = as_name(record[begin:end]), as_name(record[end:])
    return Pair(
        Endpoint(socket.inet_ntop(family, local), local_port, scopes[0]),
        Endpoint(socket.inet_ntop(family, peer), peer_port, scopes[1]),
    )

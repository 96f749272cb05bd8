"""Which sockets are meant: by state, address, port, family, user and process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .ranges import IndexOf, Range, Ranges, parse_range
from .socket import Socket
from .states import NAMES, parse_state

__all__ = ["Filter", "make_filter"]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """All that is given must hold; of several values for one thing, any.

    not_local, not_peer: those that are left out. inodes: of the processes that were asked for.
    idle_ms: the least time without data, 0 for any; what the kernel tells nothing of has none.
    """

    states: frozenset[str] = frozenset()
    local: tuple[Range, ...] = ()
    peer: tuple[Range, ...] = ()
    not_local: tuple[Range, ...] = ()
    not_peer: tuple[Range, ...] = ()
    family: int | None = None  # 4 or 6; v4-mapped counts as 4
    uids: frozenset[int] = frozenset()
    inodes: frozenset[int] | None = None
    idle_ms: int = 0

    @property
    def is_empty(self) -> bool:
        return self == Filter()

    @property
    def narrows(self) -> bool:
        """Enough to drop by. Half of all connections, a family, is nearly "everything", and so is
        all but a few."""
        return (
            bool(self.states or self.uids or self.inodes is not None or self.idle_ms)
            or (bool(self.local) and all(one.narrows for one in self.local))
            or (bool(self.peer) and all(one.narrows for one in self.peer))
        )

    @cached_property
    def _tables(self) -> list[Ranges]:
        return [Ranges(one) for one in (self.local, self.peer, self.not_local, self.not_peer)]

    def matches(self, socket: Socket, index_of: IndexOf) -> bool:
        """index_of: of devices, for ranges with a scope."""
        if self.states and socket.state not in self.states:
            return False
        if self.family and (6 if ":" in socket.local_address else 4) != self.family:
            return False
        if self.uids and socket.owner not in self.uids:
            return False
        if self.inodes is not None and (not socket.inode or socket.inode not in self.inodes):
            return False
        if self.idle_ms and (socket.idle_ms is None or socket.idle_ms < self.idle_ms):
            return False
        local = (socket.local_address, socket.local_port, socket.interface_index, index_of)
        peer = (socket.peer_address, socket.peer_port, socket.interface_index, index_of)
        of_local, of_peer, of_not_local, of_not_peer = self._tables
        return (
            (not self.local or of_local.hold(*local))
            and (not self.peer or of_peer.hold(*peer))
            and not (self.not_local and of_not_local.hold(*local))
            and not (self.not_peer and of_not_peer.hold(*peer))
        )

    def absent_device(self, index_of: IndexOf) -> str | None:
        """One that is to be left out and is not there, so that it would leave out nothing."""
        scopes = (one.scope for one in (*self.not_local, *self.not_peer) if one.scope)
        return next((one for one in scopes if index_of(one) is None), None)

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
    not_local: Iterable[str | Range] = (),
    not_peer: Iterable[str | Range] = (),
    family: int | None = None,
    uids: Iterable[int] = (),
    inodes: Iterable[int] | None = None,
    idle_s: float | None = None,
) -> Filter:
    """A Filter of texts. Raises ValueError."""
    return Filter(
        states=frozenset(name for text in _several(states) for name in parse_state(text)),
        local=_ranges(local),
        peer=_ranges(peer),
        not_local=_ranges(not_local),
        not_peer=_ranges(not_peer),
        family=family,
        uids=frozenset([uids] if isinstance(uids, int) else uids),
        inodes=None if inodes is None else frozenset(inodes),
        idle_ms=0 if idle_s is None else max(1, round(idle_s * 1000)),
    )


def _ranges(values: Iterable[str | Range]) -> tuple[Range, ...]:
    return tuple(one if isinstance(one, Range) else parse_range(one) for one in _several(values))


def _several(values: Any) -> Iterable[Any]:
    return [values] if isinstance(values, (str, Range)) else values

"""Finds TCP sockets and drops exactly those: look, match, destroy by cookie, look again.

A destroy without the cookie of a look, for a tuple that is gone, would hit the listener of that
port (Linux 6.18); so nothing is destroyed that was not seen, and a cookie is never left out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket as sockets_of_python
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, Self

from .. import _sockdiag
from .filters import Filter, make_filter
from .netns import open_namespace
from .outcome import Outcome, Result, answer
from .pairs import Endpoint, Pair, as_pair, as_pairs
from .process import inodes_of
from .states import NAMES

__all__ = ["Diag", "Socket", "drop", "find"]

AF_INET, AF_INET6 = int(sockets_of_python.AF_INET), int(sockets_of_python.AF_INET6)
SIOCGIFNAME = 0x8910  # netdevice(7)
TIMERS = {0: "off", 1: "on", 2: "keepalive", 3: "timewait", 4: "persist"}  # inet_diag.c

# An orphan of these may outlive a successful destroy before Linux 6.11.
MAY_FAIL_SILENTLY = frozenset({"fin-wait-1", "closing", "last-ack"})
CLOSING = frozenset({*MAY_FAIL_SILENTLY, "fin-wait-2", "time-wait"})
V4_MAPPED = "::ffff:"


class Socket(NamedTuple):
    """A TCP socket as a look found it; a tuple, since there may be a million.

    Addresses are canonical: IPv4 also where the socket is an IPv6 one (is_mapped). interface: the
    name it is bound to, or empty. expires_ms: until `timer` fires. Queues are bytes, of a listener
    the connections that wait and the most that may. uid and inode are 0 where nobody owns it.
    identity, with the cookie in it, tells it from a later one with the same addresses.
    """

    state: str
    local_address: str
    local_port: int
    peer_address: str
    peer_port: int
    interface: str
    is_mapped: bool
    timer: str
    expires_ms: int
    retransmissions: int
    receive_queue: int
    send_queue: int
    uid: int
    inode: int
    cookie: int
    identity: bytes

    @property
    def pair(self) -> Pair:
        return Pair(
            Endpoint(self.local_address, self.local_port, self.interface),
            Endpoint(self.peer_address, self.peer_port),
        )

    @property
    def is_listener(self) -> bool:
        return self.state == "listen"

    @property
    def owner(self) -> int | None:
        """The user's id; None without an inode: the kernel then shows 0, which is not root."""
        return self.uid if self.inode else None


class NativeHandle(Protocol):
    """What is used of _sockdiag.Handle."""

    def dump(
        self, family: int, states: int, local_port: int = 0, peer_port: int = 0
    ) -> list[_sockdiag.Row]: ...
    def destroy(self, identities: list[bytes]) -> list[int]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Diag:
    """A handle to a network namespace's sockets, for many looks and drops; close it in the end."""

    def __init__(self, netns: str | None = None, *, handle: NativeHandle | None = None) -> None:
        """netns: the name of a network namespace, otherwise the thread's own. Raises OSError."""
        self._names: dict[int, str] = {}
        self._is_stopping = False
        if handle is not None:
            self._handle = handle
        elif netns is None:
            self._handle = _sockdiag.Handle()
        else:
            fd = open_namespace(netns)
            try:
                self._handle = _sockdiag.Handle(namespace_fd=fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._handle.close()

    # ---- looking ------------------------------------------------------------------------------

    def find(
        self, wanted: Filter, *, pairs: Sequence[Pair] | None = None, listeners: bool = False
    ) -> list[Socket]:
        """Sockets that match the filter and, if given, are one of the pairs. Raises OSError."""
        found = self._look(wanted, listeners, _ports_of(pairs) if pairs else None)
        if pairs is None:
            return found
        by_ends = _by_ends(found)
        return [one for pair in pairs for one in self._of_pair(pair, by_ends)]

    def _look(
        self, wanted: Filter, listeners: bool, ports: tuple[int, int] | None = None
    ) -> list[Socket]:
        mask = wanted.mask(listeners)
        if not mask:
            return []
        local_port, peer_port = ports or wanted.ports()
        found = []
        # An IPv4 connection of a dual-stack socket shows only among the IPv6 ones.
        for family in (AF_INET, AF_INET6):
            for row in self._handle.dump(family, mask, local_port, peer_port):
                one = self._socket(row)
                if wanted.matches(one) and (listeners or not one.is_listener):
                    found.append(one)
        return found

    def _socket(self, row: _sockdiag.Row) -> Socket:
        local, peer = row[2], row[4]
        mapped = local.startswith(V4_MAPPED) and peer.startswith(V4_MAPPED)
        if mapped:
            local, peer = local[7:], peer[7:]
        elif local.startswith(V4_MAPPED) and peer == "::":
            mapped, local, peer = True, local[7:], "0.0.0.0"  # a listener
        return Socket(
            NAMES.get(row[1], str(row[1])),
            local,
            row[3],
            peer,
            row[5],
            self._interface(row[6]) if row[6] else "",
            mapped,
            TIMERS.get(row[8], str(row[8])),
            row[9],
            row[10],
            row[11],
            row[12],
            row[13],
            row[14],
            row[7],
            row[15],
        )

    def _interface(self, index: int) -> str:
        """Its name in the handle's namespace, or the index if it has gone."""
        if index not in self._names:
            request = struct.pack("16si20x", b"", index)
            try:
                reply = fcntl.ioctl(self._handle.fileno(), SIOCGIFNAME, request)
                self._names[index] = reply[:16].rstrip(b"\0").decode("ascii", "replace")
            except OSError:
                self._names[index] = str(index)
        return self._names[index]

    def _of_pair(self, pair: Pair, by_ends: dict[Any, list[Socket]]) -> list[Socket]:
        scope = pair.local.scope or pair.peer.scope
        both = pair.local.scope and pair.peer.scope
        if both and pair.local.scope != pair.peer.scope:
            return []
        found = by_ends.get((*pair.local[:2], *pair.peer[:2]), [])
        if scope.isdigit():
            scope = self._interface(int(scope))
        return [one for one in found if not scope or one.interface == scope]

    # ---- dropping -----------------------------------------------------------------------------

    def drop_pairs(
        self, pairs: Sequence[Pair], wanted: Filter, *, listeners: bool = False, dry: bool = False
    ) -> Iterator[Outcome]:
        """An outcome for each pair, in the end for all. Raises OSError."""
        by_ends = _by_ends(self._look(Filter(), True, _ports_of(pairs)))
        targets: list[Socket] = []
        for pair in pairs:
            found = self._of_pair(pair, by_ends)
            matching = [one for one in found if wanted.matches(one)]
            if not found:
                yield Outcome(pair, Result.GONE, reason="no such socket")
            elif not matching:
                reason = "does not match the filter"
                yield Outcome(pair, Result.PROTECTED, found[0], reason=reason)
            elif len({one.interface for one in matching}) > 1:
                reason = "on several interfaces: say which, such as ADDRESS%eth0"
                yield Outcome(pair, Result.PROTECTED, matching[0], reason=reason)
            else:
                targets += matching
        yield from self.drop_sockets(list(dict.fromkeys(targets)), listeners=listeners, dry=dry)

    def drop_sockets(
        self, found: Iterable[Socket], *, listeners: bool = False, dry: bool = False
    ) -> Iterator[Outcome]:
        """An outcome for each socket; after stop_soon() those that have not been tried
        have none. Raises OSError."""
        self._is_stopping = False
        batch: list[Socket] = []
        for one in found:
            if one.is_listener and not listeners:
                reason = "a listener: dropped with --listeners only"
                yield Outcome(one.pair, Result.PROTECTED, one, reason=reason)
            elif dry:
                yield Outcome(one.pair, Result.DROPPED, one, reason="dry run")
            else:
                batch.append(one)
                if len(batch) == _sockdiag.MOST_AT_ONCE:
                    yield from self._destroy(batch)
                    batch = []
            if self._is_stopping:
                return
        if batch:
            yield from self._destroy(batch)

    def stop_soon(self) -> None:
        """Has drop_sockets() end after the batch that it is at, whose outcomes are all told; from
        a signal handler or another thread."""
        self._is_stopping = True

    def _destroy(self, batch: list[Socket]) -> list[Outcome]:
        errors = self._handle.destroy([one.identity for one in batch])
        unsure = {
            one.identity
            for one, error in zip(batch, errors, strict=True)
            if error == _sockdiag.UNANSWERED or (error == 0 and one.state in MAY_FAIL_SILENTLY)
        }
        left = self._still_there([one for one in batch if one.identity in unsure])
        outcomes = []
        for one, error in zip(batch, errors, strict=True):
            if one.identity in left:
                reason = "still there after the kernel's answer"
                if error == _sockdiag.UNANSWERED:
                    reason = "the kernel did not answer, and it is still there"
                outcomes.append(Outcome(one.pair, Result.REFUSED, one, reason=reason))
            else:
                outcomes.append(answer(one, 0 if error == _sockdiag.UNANSWERED else error))
        return outcomes

    def _still_there(self, doubtful: list[Socket]) -> set[bytes]:
        """Identities of those that a second look finds, if need be in a later state of closing."""
        if not doubtful:
            return set()
        looked = self._look(Filter(), True, _ports_of([one.pair for one in doubtful]))
        identities = {one.identity for one in looked}
        # A time-wait socket is another object, and has another cookie.
        closing = {one.identity[:-8] for one in looked if one.state in CLOSING}
        return {
            one.identity
            for one in doubtful
            if one.identity in identities
            or (one.state in MAY_FAIL_SILENTLY and one.identity[:-8] in closing)
        }


def _by_ends(found: Iterable[Socket]) -> dict[Any, list[Socket]]:
    by_ends: dict[Any, list[Socket]] = defaultdict(list)
    for one in found:
        by_ends[one[1:5]].append(one)
    return by_ends


def _ports_of(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Ports that all of them share, which the kernel filters by; 0 is any."""
    local = {pair.local.port for pair in pairs}
    peer = {pair.peer.port for pair in pairs}
    return (
        local.pop() if len(local) == 1 else 0,
        peer.pop() if len(peer) == 1 else 0,
    )


# ---- for programs -------------------------------------------------------------------------------

PairLike = Pair | Sequence[object] | str


def find(
    pairs: Iterable[PairLike] | None = None,
    *,
    states: Iterable[str] = (),
    local: Iterable[str] = (),
    peer: Iterable[str] = (),
    family: int | None = None,
    pid: Iterable[int] | int | None = None,
    uid: Iterable[int] | int = (),
    listeners: bool = False,
    netns: str | None = None,
) -> list[Socket]:
    """TCP sockets that match all that is given; without anything, every one but listeners.

    pairs: Pair, (local address, local port, peer address, peer port) or "LOCAL PEER" each.
    states: names of ss, such as "time-wait"; local, peer: "10.0.0.0/8", ":80", ":80-90";
    family: 4 or 6. Needs no privilege. Raises ValueError (a wrong value) and OSError.
    """
    inodes = None
    if pid is not None:
        pids = [pid] if isinstance(pid, int) else pid
        inodes = set[int]().union(*(inodes_of(one) for one in pids))
    if family not in (None, 4, 6):
        raise ValueError(f"family: {family!r} is neither 4 nor 6")
    wanted = make_filter(
        states=states,
        local=local,
        peer=peer,
        family=family,
        uids=[uid] if isinstance(uid, int) else uid,
        inodes=inodes,
    )
    listed = None if pairs is None else as_pairs(pairs)
    with Diag(netns) as diag:
        return diag.find(wanted, pairs=listed, listeners=listeners)


def drop(
    what: Iterable[PairLike | Socket],
    *,
    listeners: bool = False,
    dry_run: bool = False,
    netns: str | None = None,
    progress: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Drops these sockets and no others; needs CAP_NET_ADMIN.

    what: Sockets of find(), which are dropped only while they are still the same ones; or pairs
    as find() takes them, of which every one is looked up first. progress: called with each
    outcome. A refusal is an outcome, with its errno. Raises ValueError before anything is dropped,
    and OSError if the kernel cannot be asked.
    """
    if isinstance(what, (str, bytes)):
        raise ValueError("a single text: parse_pairs() makes pairs of it")
    found: list[Socket] = []
    pairs: dict[Pair, None] = {}
    for one in what:
        if isinstance(one, Socket):
            found.append(one)
        else:
            pairs[as_pair(one)] = None
    outcomes: list[Outcome] = []
    with Diag(netns) as diag:
        drops = [diag.drop_sockets(dict.fromkeys(found), listeners=listeners, dry=dry_run)]
        if pairs:
            drops.append(diag.drop_pairs(list(pairs), Filter(), listeners=listeners, dry=dry_run))
        for outcome in chain.from_iterable(drops):
            outcomes.append(outcome)
            if progress is not None:
                progress(outcome)
    return outcomes


def is_unavailable(error: OSError) -> bool:
    """Whether it says that the kernel has no netlink for TCP sockets: not built, or no module."""
    return error.errno in (
        errno.ENOENT,
        errno.EPROTONOSUPPORT,
        errno.EAFNOSUPPORT,
        errno.EOPNOTSUPP,
    )

"""Finds TCP sockets and drops exactly those: look, match, destroy by cookie, look again.

A destroy without the cookie of a look, for a tuple that is gone, would hit the listener of that
port (Linux 6.18); so nothing is destroyed that was not seen, and a cookie is never left out.
"""

from __future__ import annotations

import errno
import os
import socket as python_socket
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Protocol, Self

from . import _sockdiag
from .devices import Devices
from .filters import Filter
from .netns import open_namespace
from .outcome import Outcome, Result, answer
from .pairs import Pair, may_be_cut
from .process import Unseen, namespace_of
from .socket import Socket
from .states import NAMES

__all__ = ["Diag", "is_unavailable"]

AF_INET, AF_INET6 = int(python_socket.AF_INET), int(python_socket.AF_INET6)
NUMBERS = {name: number for number, name in NAMES.items()}
TIMERS = {0: "off", 1: "on", 2: "keepalive", 3: "timewait", 4: "persist"}  # inet_diag.c

# An orphan of these may outlive a successful destroy before Linux 6.11.
MAY_FAIL_SILENTLY = frozenset({"fin-wait-1", "closing", "last-ack"})
# A socket leaves it only for good. In every other one it can go on to another state with the same
# cookie: half-open to established, established to time-wait (tried on Linux 6.18).
LAST_STATE = "time-wait"
# Outcomes of pairs that are not there: each takes a kilobyte.
TOLD_AT_ONCE = 10_000
# Of socket(AF_NETLINK): every kernel with a network has it, so it is a filter that says so.
REFUSED = (errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES)


class NativeHandle(Protocol):
    """What is used of _sockdiag.Handle."""

    def dump(
        self, family: int, states: int, local_port: int = 0, peer_port: int = 0
    ) -> list[_sockdiag.Row]: ...
    def states(self, identities: list[bytes], idle_ms: int = 0) -> list[int]: ...
    def destroy(self, identities: list[bytes]) -> list[int]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Diag:
    """A handle to a network namespace's sockets, for many looks and drops; close it in the end."""

    def __init__(self, netns: str | None = None, *, handle: NativeHandle | None = None) -> None:
        """netns: a network namespace as open_namespace() takes it, otherwise the thread's own.
        Raises OSError: Unseen if this process may not, and what open_namespace() raises."""
        self._is_stopped = False
        self.unaccounted = 0  # given to the kernel to destroy, and not told yet what became of them
        # Device and inode of the network namespace, where that is known.
        self.namespace: tuple[int, int] | None = None
        if handle is not None:
            self._handle = handle
        elif netns is None:
            self._handle = _open(-1)
            self.namespace = namespace_of("thread-self")
        else:
            fd = open_namespace(netns)
            try:
                self._handle = _open(fd)
                self.namespace = os.fstat(fd).st_dev, os.fstat(fd).st_ino
            finally:
                os.close(fd)
        self._devices = Devices(self._handle.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._handle.close()

    def check_devices(self, wanted: Filter) -> None:
        """Raises ValueError if one that is to be left out is not there now, and OSError."""
        self._devices.forget()
        absent = wanted.absent_device(self._devices.index)
        if absent is not None:
            raise ValueError(f"there is no device {absent!r}, so that nothing would be left out")

    # ---- looking ------------------------------------------------------------------------------

    def find(
        self, wanted: Filter, *, pairs: Collection[Pair] | None = None, listeners: bool = False
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
        self._devices.forget()
        found = []
        # An IPv4 connection of a dual-stack socket shows only among the IPv6 ones.
        for family in (AF_INET, AF_INET6):
            for row in self._handle.dump(family, mask, local_port, peer_port):
                one = self._socket(row)
                if wanted.matches(one, self._devices.index) and (listeners or not one.is_listener):
                    found.append(one)
        return found

    def _socket(self, row: _sockdiag.Row) -> Socket:
        local, peer = row[2], row[4]
        mapped = _is_mapped(local) and _is_mapped(peer)
        if mapped:
            local, peer = local[7:], peer[7:]
        elif _is_mapped(local) and peer == "::":
            mapped, local, peer = True, local[7:], "0.0.0.0"  # a listener
        return Socket(
            NAMES.get(row[1], str(row[1])),
            local,
            row[3],
            peer,
            row[5],
            self._devices.name(row[6]) if row[6] else "",
            row[6],
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
            row[16],
            row[17],
        )

    def _of_pair(self, pair: Pair, by_ends: dict[Any, list[Socket]]) -> list[Socket]:
        found = by_ends.get((*pair.local[:2], *pair.peer[:2]), [])
        scopes = {end.scope for end in pair if end.scope}
        if not scopes or not found:
            return found
        called = self._devices.is_called
        return [one for one in found if all(called(one.interface_index, scope) for scope in scopes)]

    # ---- dropping -----------------------------------------------------------------------------

    def drop_pairs(
        self, pairs: Collection[Pair], wanted: Filter, *, listeners: bool = False, dry: bool = False
    ) -> Iterator[list[Outcome]]:
        """An outcome for each pair, in the end for all; batches as of drop_sockets(), and before
        them those of pairs that nothing is done about."""
        by_ends = _by_ends(self._look(Filter(), True, _ports_of(pairs)))
        untouched: list[Outcome] = []
        targets: list[Socket] = []
        for pair in pairs:
            found = self._of_pair(pair, by_ends)
            matching = [one for one in found if wanted.matches(one, self._devices.index)]
            if not found:
                cut = "; if netstat cut the address short: netstat -W" if may_be_cut(pair) else ""
                untouched.append(Outcome(pair, Result.GONE, reason=f"no such socket{cut}"))
            elif not matching:
                reason = "does not match the filter"
                untouched.append(Outcome(pair, Result.PROTECTED, found[0], reason=reason))
            elif len({one.interface_index for one in matching}) > 1:
                reason = "on several interfaces: say which, such as ADDRESS%eth0"
                untouched.append(Outcome(pair, Result.PROTECTED, matching[0], reason=reason))
            else:
                targets += matching
            if len(untouched) == TOLD_AT_ONCE:
                yield untouched
                untouched = []
                if self._is_stopped:
                    return
        if untouched:
            yield untouched
        unique = dict.fromkeys(targets)
        yield from self.drop_sockets(
            unique, wanted.states, wanted.idle_ms, listeners=listeners, dry=dry
        )

    def drop_sockets(
        self,
        found: Iterable[Socket],
        states: Collection[str] | None = None,
        idle_ms: int = 0,
        *,
        listeners: bool = False,
        dry: bool = False,
    ) -> Iterator[list[Outcome]]:
        """Outcomes of one batch after the other, which is dropped when it is asked for, and whose
        states are looked up right before: a socket that went on to another is not what was asked
        for. states: all that will do, empty for any; None: the one that it was found in. idle_ms:
        as of Filter.

        After stop() nothing more is dropped, and what was not tried has no outcome. Raises OSError.
        """
        batch: list[Socket] = []
        for one in found:
            batch.append(one)
            if len(batch) == _sockdiag.MOST_AT_ONCE:
                if self._is_stopped:
                    return
                yield self._drop_batch(batch, states, idle_ms, listeners, dry)
                batch = []
        if batch and not self._is_stopped:
            yield self._drop_batch(batch, states, idle_ms, listeners, dry)

    def stop(self) -> None:
        """Nothing is dropped after the batch that is under way; from a signal handler or another
        thread. For good."""
        self._is_stopped = True

    def _drop_batch(
        self,
        batch: list[Socket],
        states: Collection[str] | None,
        idle_ms: int,
        listeners: bool,
        dry: bool,
    ) -> list[Outcome]:
        checked: list[Outcome | Socket] = []
        for one, now in zip(batch, self._states_now(batch, idle_ms, dry), strict=True):
            if now < 0:
                checked.append(answer(one, -now))
            elif now & _sockdiag.AWAKE:
                reason = "no longer idle: that was not asked for"
                checked.append(Outcome(one.pair, Result.PROTECTED, one, reason=reason))
            elif now not in NAMES:
                reason = "the kernel did not say which state it is in"
                checked.append(Outcome(one.pair, Result.REFUSED, one, reason=reason))
            else:
                checked.append(_as_asked(one, NAMES[now], states, listeners))
        targets = [one for one in checked if isinstance(one, Socket)]
        if dry:
            fates = [Outcome(one.pair, Result.DROPPED, one, reason="dry run") for one in targets]
        else:
            fates = self._destroy(targets)
        rest = iter(fates)
        return [next(rest) if isinstance(one, Socket) else one for one in checked]

    def _states_now(self, batch: list[Socket], idle_ms: int, dry: bool) -> list[int]:
        """A look at each of them alone: it costs a microsecond, and misses none under churn."""
        # A lookup of one of several listeners on a port finds any of them.
        needless = {LAST_STATE, "listen"}
        asked = [one.identity for one in batch if not dry and one.state not in needless]
        answers = self._handle.states(asked, idle_ms) if asked else []
        now = dict(zip(asked, answers, strict=True))
        return [now.get(one.identity, NUMBERS.get(one.state, 0)) for one in batch]

    def _destroy(self, batch: list[Socket]) -> list[Outcome]:
        if not batch:
            return []
        self.unaccounted = len(batch)
        try:
            errors = self._handle.destroy([one.identity for one in batch])
        except OSError:
            self.unaccounted = 0  # nothing was sent
            raise
        doubtful = [
            one
            for one, error in zip(batch, errors, strict=True)
            if error == _sockdiag.UNANSWERED
            or (error == 0 and one.state in MAY_FAIL_SILENTLY)
            or (error == errno.ENOENT and one.is_listener)
        ]
        there = "it is still there"
        try:
            left = self._still_there(doubtful)
        except OSError as failed:  # which must not hide what became of the others
            left = {one.identity for one in doubtful}
            there = f"it may still be there ({failed.strerror or failed})"
        outcomes = []
        for one, error in zip(batch, errors, strict=True):
            if one.identity in left:
                said = "did not answer" if error == _sockdiag.UNANSWERED else "answered"
                reason = f"the kernel {said}, and {there}"
                outcomes.append(Outcome(one.pair, Result.REFUSED, one, reason=reason))
            else:
                outcomes.append(answer(one, 0 if error == _sockdiag.UNANSWERED else error))
        self.unaccounted = 0
        return outcomes

    def _still_there(self, doubtful: list[Socket]) -> set[bytes]:
        """Identities of those that a second look finds, in whatever state."""
        if not doubtful:
            return set()
        looked = self._look(Filter(), True, _ports_of([one.pair for one in doubtful]))
        return {one.identity for one in looked} & {one.identity for one in doubtful}


def _open(namespace_fd: int) -> _sockdiag.Handle:
    """Raises OSError, and Unseen where it is not the kernel that lacks something."""
    try:
        return _sockdiag.Handle(namespace_fd=namespace_fd)
    except FileNotFoundError as error:  # /proc/thread-self
        text = "/proc is not mounted, which a change of the network namespace needs"
        raise Unseen(error.errno, text) from None
    except OSError as error:
        said = error.strerror or str(error)
        if said.startswith("socket(") and error.errno in REFUSED:
            text = f"{said}: a sandbox keeps AF_NETLINK from this process, such as systemd's"
            raise Unseen(error.errno, f"{text} RestrictAddressFamilies= or seccomp") from None
        if said.startswith("setns") and error.errno == errno.EPERM:
            raise Unseen(error.errno, f"{said}: it needs CAP_SYS_ADMIN, use sudo") from None
        raise


def _is_mapped(address: str) -> bool:
    """As inet_ntop(3) writes it; ::ffff:0:1.2.3.4, which is translated (RFC 2765), has no dots."""
    return address.startswith("::ffff:") and "." in address


def _as_asked(
    one: Socket, state: str, states: Collection[str] | None, listeners: bool
) -> Outcome | Socket:
    """The socket as it is now, if that is to be dropped."""
    wanted = {one.state} if states is None else states
    was, one = one.state, one if state == one.state else one._replace(state=state)
    if one.is_listener and not listeners:
        reason = "a listener: dropped with --listeners only"
        return Outcome(one.pair, Result.PROTECTED, one, reason=reason)
    if wanted and state not in wanted:
        reason = f"no longer {was}: that was not asked for"
        return Outcome(one.pair, Result.PROTECTED, one, reason=reason)
    return one


def _by_ends(found: Iterable[Socket]) -> dict[Any, list[Socket]]:
    by_ends: dict[Any, list[Socket]] = defaultdict(list)
    for one in found:
        by_ends[one[1:5]].append(one)
    return by_ends


def _ports_of(pairs: Iterable[Pair]) -> tuple[int, int]:
    """Ports that all of them share, which the kernel filters by; 0 is any."""
    local = peer = -1
    for pair in pairs:
        local = pair.local.port if local in (-1, pair.local.port) else 0
        peer = pair.peer.port if peer in (-1, pair.peer.port) else 0
        if local == peer == 0:
            break
    return max(local, 0), max(peer, 0)


def is_unavailable(error: OSError) -> bool:
    """Whether it says that the kernel has no netlink for TCP sockets: not built, or no module."""
    return error.errno in (
        errno.ENOENT,
        errno.EPROTONOSUPPORT,
        errno.EOPNOTSUPP,
    )

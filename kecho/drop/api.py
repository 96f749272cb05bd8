"""find() and drop(): what a program calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from .diag import Diag
from .filters import Filter, make_filter
from .outcome import Outcome
from .pairs import Pair, as_pair, as_pairs
from .process import Process
from .socket import Socket

__all__ = ["drop", "find"]

PairLike = Pair | Sequence[object] | str


def find(
    pairs: Iterable[PairLike] | None = None,
    *,
    states: Iterable[str] = (),
    local: Iterable[str] = (),
    peer: Iterable[str] = (),
    not_local: Iterable[str] = (),
    not_peer: Iterable[str] = (),
    family: int | None = None,
    pid: Iterable[int] | int | None = None,
    uid: Iterable[int] | int = (),
    idle: float | None = None,
    listeners: bool = False,
    netns: str | None = None,
) -> list[Socket]:
    """TCP sockets that match all that is given; without anything, every one but listeners.

    pairs: Pair, (local address, local port, peer address, peer port) or "LOCAL PEER" each.
    states: names of ss, such as "time-wait"; local, peer: "10.0.0.0/8", ":80", ":80-90",
    "fe80::1%eth0" with the device that the socket is bound to (most are bound to none); not_local,
    not_peer: what is left out, the same way; family: 4 or 6; idle: seconds in which it has neither
    sent nor received data. Needs no privilege. Raises ValueError (a wrong value, or no such device
    to leave out) and OSError: PermissionError for what cannot be seen, ProcessLookupError for a
    process that is not there.
    """
    inodes = None
    if pid is not None:
        pids = [pid] if isinstance(pid, int) else pid
        inodes = set[int]().union(*(Process(one).inodes() for one in pids))
    if family not in (None, 4, 6):
        raise ValueError(f"family: {family!r} is neither 4 nor 6")
    wanted = make_filter(
        states=states,
        local=local,
        peer=peer,
        not_local=not_local,
        not_peer=not_peer,
        family=family,
        uids=[uid] if isinstance(uid, int) else uid,
        inodes=inodes,
        idle_s=idle,
    )
    listed = None if pairs is None else as_pairs(pairs)
    with Diag(netns) as diag:
        diag.check_devices(wanted)
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

    what: Sockets of find(), which are dropped only while they are still the same ones and in the
    same state (otherwise they are GONE, or PROTECTED); or pairs as find() takes them, of which
    every one is looked up first. progress: called with each outcome. A refusal is an outcome, with
    its errno. Raises ValueError before anything is dropped, and OSError if the kernel cannot be
    asked.
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
        for batch in chain(*drops):
            outcomes += batch
            if progress is not None:
                for outcome in batch:
                    progress(outcome)
    return outcomes

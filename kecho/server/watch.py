"""Looks after a running server twice a second: says what is going wrong and how to help it, and
finds listeners that were closed from outside."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..system import sysctl
from ..system.netstat import TcpCounters
from .seldom import Seldom
from .sockets.addresses import Address, describe_addresses
from .sockets.inherited import Before

if TYPE_CHECKING:
    from .config import ServerConfig

__all__ = ["INTERVAL_S", "Place", "Watch"]

INTERVAL_S = 0.5  # a dead listener is found within it
_REPORT_EVERY = 2  # looks, so that what is said is of a second
_TROUBLE_AGAIN_S = 60.0  # until one that lasts is worth another line

# The SYN queue was full: cookies were sent instead of keeping the SYN, or it was dropped.
_SYN_QUEUE = ("TCPReqQFullDoCookies", "TCPReqQFullDrop")
_LISTEN = ("ListenOverflows", "ListenDrops")  # the accept queue was full; SYNs dropped in all

log = logging.getLogger("kecho")


class Engine(Protocol):
    """What is used of _engine.Engine."""

    def listener_figures(self) -> list[tuple[int, int, int, bool]]: ...
    def counters(self) -> list[dict[str, Any]]: ...


class Udp(Protocol):
    """What is used of _udp.Echo."""

    def counters(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Place:
    """Where a listener is; `before`: what an inherited one was like."""

    address: Address
    is_unix: bool
    before: Before | None = None

    @property
    def dropped_before(self) -> int:
        """SYNs, before the server began."""
        return 0 if self.before is None else self.before.dropped


class Watch:
    """What one look has to know of the one before. Made where the listeners are: in their network
    namespace, and before files can no longer be opened."""

    def __init__(self, config: ServerConfig, places: Sequence[Place]) -> None:
        self._config = config
        self._places = places
        self._somaxconn = sysctl.somaxconn()
        self._network = TcpCounters((*_SYN_QUEUE, *_LISTEN))
        self._network_before = self._network_at_first = self._network.read()
        self._overflows: int | None = None
        # As the sockets count, which an inherited one did before it was this server's.
        self._dropped_before = [place.dropped_before for place in places]
        self._errors_before: dict[str, int] = {}
        self._cookies = 0  # not told yet
        self._pauses_before = 0
        self._limit_reached = 0  # looks that found it so
        self._unsent_before = 0
        self._seldom = Seldom()
        self._looks = 0

    def close(self) -> None:
        self._network.close()

    def overflows(self) -> int | None:
        """SYNs that found an accept queue of this network full since this was made; None: the
        kernel does not tell."""
        now = self._network.read().get("ListenOverflows")
        if now is not None:
            self._overflows = now - self._network_at_first.get("ListenOverflows", 0)
        return self._overflows

    def look(self, engine: Engine, udp: Udp | None = None) -> tuple[Address, ...]:
        """Returns where a listener has died, and says nothing then."""
        figures = engine.listener_figures()
        dead = dict.fromkeys(
            place.address for place, one in zip(self._places, figures, strict=True) if one[3]
        )
        if dead:
            return tuple(dead)
        self._looks += 1
        if self._looks % _REPORT_EVERY == 0:
            network = self._network.read()
            came = {name: now - self._network_before.get(name, 0) for name, now in network.items()}
            self._network_before = network
            self._report_accept_queues(figures, came)
            self._report_syn_queue(came)
            self._report_errors(engine)
            if udp is not None:
                self._report_unsent(udp)
        return ()

    # ---- what is said -----------------------------------------------------------------------

    def _report_accept_queues(self, figures: list[Any], came: Mapping[str, int]) -> None:
        """For each address; its listeners, of which percpu has several, together.

        A socket counts all that it drops: also segments that no client sends (a port scan's), and
        SYNs for which there was no room among the half-open. The network's counters tell them
        apart.
        """
        by_address: dict[Address, list[int]] = {}
        for number, place in enumerate(self._places):
            if not place.is_unix:
                by_address.setdefault(place.address, []).append(number)
        for address, numbers in by_address.items():
            dropped = sum(figures[number][0] - self._dropped_before[number] for number in numbers)
            for number in numbers:
                self._dropped_before[number] = figures[number][0]
            refused = 0
            if dropped and not came.get("ListenOverflows", dropped):
                dropped, refused = 0, min(dropped, came.get("ListenDrops", 0))
            self._warn_of_refusals(address, refused)
            longest = max((figures[number][1:3] for number in numbers), key=lambda one: one[0])
            self._warn_of_drops(address, self._places[numbers[0]].before, dropped, *longest)

    def _warn_of_drops(
        self, address: Address, before: Before | None, dropped: int, length: int, length_most: int
    ) -> None:
        due = self._seldom.tell(("drops", address), dropped)
        if due is None:
            return
        limit = self._somaxconn
        backlog = self._config.backlog if before is None else before.backlog
        wanted = max(2 * backlog, 1024)
        help_text = f"--backlog {wanted}"
        if before is not None:
            help_text = f"have whoever opened it ask for {wanted} (Backlog= of systemd.socket(5))"
        if wanted > limit:
            help_text += f" and sysctl -w net.core.somaxconn={wanted}"
        log.warning(
            "%s: %d SYNs dropped in the last %s, the accept queue was full (now %d of %d; "
            "backlog %d, net.core.somaxconn %d); such clients try again after 1 s, 2 s, ...: %s",
            describe_addresses((address,)),
            due[0],
            _seconds(due[1]),
            length,
            length_most,
            backlog,
            limit,
            help_text,
        )

    def _warn_of_refusals(self, address: Address, dropped: int) -> None:
        due = self._seldom.tell(("refusals", address), dropped)
        if due is not None:
            log.warning(
                "%s: %d SYNs dropped in the last %s, not for a full accept queue: too many "
                "handshakes under way (net.ipv4.tcp_max_syn_backlog, tcp_syncookies), or no memory",
                describe_addresses((address,)),
                due[0],
                _seconds(due[1]),
            )

    def _report_syn_queue(self, came: Mapping[str, int]) -> None:
        cookies, dropped = (came.get(name, 0) for name in _SYN_QUEUE)
        self._cookies += cookies
        due = self._seldom.tell("SYN queue", cookies + dropped)
        if due is not None:
            cookies, self._cookies = self._cookies, 0
            log.warning(
                "a SYN queue was full in the last %s: %d SYN cookies sent, %d SYNs dropped (by "
                "all listeners of this network); a flood, or too short a --backlog (%d)",
                _seconds(due[1]),
                cookies,
                due[0] - cookies,
                self._config.backlog,
            )

    def _report_errors(self, engine: Engine) -> None:
        """A line when a trouble begins, and seldom ones while it lasts; the counters have the
        rest."""
        errors: dict[str, int] = {}
        evicted = pauses = 0
        for one in engine.counters():
            evicted += one["closed"]["evicted"]
            pauses += one["accept_pauses"]
            for name, count in one["errors"].items():
                errors[name] = errors.get(name, 0) + count
        errors["evicted"] = evicted
        before = self._errors_before
        others = any(errors[name] != before.get(name, 0) for name in _PAUSING)
        if self._config.max_connections is not None and pauses > self._pauses_before and not others:
            self._limit_reached += 1
        self._pauses_before = pauses
        errors["limit"] = self._limit_reached
        figures = {
            "descriptors": (sysctl.descriptor_limit(),),
            "limit": (self._config.max_connections,),
        }
        for name, text in _TROUBLES.items():
            count = errors[name] - before.get(name, 0)
            if count and self._seldom.tell(name, count, _TROUBLE_AGAIN_S) is not None:
                log.warning(text, *figures.get(name, ()))
        self._errors_before = errors

    def _report_unsent(self, udp: Udp) -> None:
        """What waits for a neighbour's address takes room in the socket's one send buffer: arp(7),
        __neigh_event_send() in net/core/neighbour.c."""
        unsent = sum(one["errors"]["full"] for one in udp.counters())
        due = self._seldom.tell("unsent", unsent - self._unsent_before)
        self._unsent_before = unsent
        if due is not None:
            log.warning(
                "udp: %d answers lost in the last %s, the send buffer was full: the network is "
                "slower than they come, or a spoofer has many wait for neighbours that are not "
                "there (ip neigh): sysctl -w net.ipv4.neigh.DEV.unres_qlen_bytes=2048 (and "
                "net.ipv6's), net.core.wmem_max=4194304 before the start",
                due[0],
                _seconds(due[1]),
            )


def _seconds(passed_s: float) -> str:
    return "second" if passed_s < 1.5 else f"{passed_s:.0f} s"


_PAUSING = ("accept", "descriptors", "memory")  # errors upon which accepting pauses
_TROUBLES = {
    "descriptors": "no descriptor is left for another client (RLIMIT_NOFILE %d, or fs.file-max): "
    "accepting pauses until one is closed; ulimit -n, or --max-connections",
    "memory": "the kernel has no memory for another socket or buffer: accepting pauses",
    "limit": "--max-connections %d is reached: further clients wait in the accept queue",
    "evicted": "--max-buffer-memory is reached: clients that do not read are reset, the slowest "
    "first",
}

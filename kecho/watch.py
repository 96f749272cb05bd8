"""Looks after a running server twice a second: says what is going wrong and how to help it, and
listens again where a listener was closed from outside."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from . import tuning
from .addresses import Address, describe_addresses
from .inherited import Recipe
from .listen import listen_again, new_socket
from .netstat import TcpCounters
from .steering import Group, steer_without_order

if TYPE_CHECKING:
    from .config import ServerConfig

__all__ = ["INTERVAL_S", "Place", "Watch"]

INTERVAL_S = 0.5  # a dead listener is replaced within a second
_REPORT_EVERY = 2  # looks, so that what is said is of a second
_SAY_AGAIN_AFTER = 120  # looks without the trouble, until it is worth another line

# The SYN queue was full: cookies were sent instead of keeping the SYN, or it was dropped.
_SYN_QUEUE = ("TCPReqQFullDoCookies", "TCPReqQFullDrop")
_LISTEN = ("ListenOverflows", "ListenDrops")  # the accept queue was full; SYNs dropped in all

log = logging.getLogger("kecho")


class Engine(Protocol):
    """What is used of _engine.Engine."""

    def listener_figures(self) -> list[tuple[int, int, int, bool, bool]]: ...
    def listener_fd(self, number: int) -> int: ...
    def revive_listener(self, number: int, fd: int) -> None: ...
    def counters(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Place:
    """Where a listener is; `shares`: it is one of a SO_REUSEPORT group, or may be; `recipe`: what
    an inherited one is like; `dropped_before`: SYNs that it had dropped before the server began."""

    family: int
    address: Address
    is_unix: bool
    is_inherited: bool
    shares: bool
    recipe: Recipe | None = None
    dropped_before: int = 0

    @property
    def kind(self) -> tuple[int, int]:
        return self.family, 0 if self.recipe is None else self.recipe.protocol


class Watch:
    """What one look has to know of the one before. Made where the listeners are: in their network
    namespace, and before files can no longer be opened."""

    def __init__(
        self,
        config: ServerConfig,
        places: Sequence[Place],
        groups: Sequence[Group],
        steer: Callable[[int, list[int]], None],
    ) -> None:
        """steer: _engine.attach_cpu_steering."""
        self._config = config
        self._attach_cpu_steering = steer
        self._places = places
        self._groups = groups
        self._somaxconn = tuning.somaxconn()
        self._network = TcpCounters((*_SYN_QUEUE, *_LISTEN))
        self._network_before = self._network_at_first = self._network.read()
        self._overflows: int | None = None
        # As the sockets count, which an inherited one did before it was this server's.
        self._dropped_before = [place.dropped_before for place in places]
        self._errors_before: dict[str, int] = {}
        self._pauses_before = 0
        self._limit_reached = 0  # looks that found it so
        self._quiet_looks: dict[str, int] = {}  # since a trouble was last seen
        self._not_reopened: dict[int, str] = {}
        self._has_said_by_hash = False
        # A socket of each kind in reserve: when one is needed there may be no descriptor.
        self._spares: dict[tuple[int, int], socket.socket] = {}
        self._keep_spares()
        self._looks = 0

    def close(self) -> None:
        self._network.close()
        while self._spares:
            self._spares.popitem()[1].close()

    def overflows(self) -> int | None:
        """SYNs that found an accept queue of this network full since this was made; None: the
        kernel does not tell."""
        now = self._network.read().get("ListenOverflows")
        if now is not None:
            self._overflows = now - self._network_at_first.get("ListenOverflows", 0)
        return self._overflows

    def _keep_spares(self) -> None:
        for place in self._places:
            if not place.is_unix and place.kind not in self._spares:
                with suppress(OSError):  # tried again with the next look
                    self._spares[place.kind] = new_socket(place.family, place.recipe)

    def look(self, engine: Engine) -> None:
        figures = engine.listener_figures()
        dead = [number for number, one in enumerate(figures) if one[3]]
        if dead:
            self._reopen(engine, dead, figures)
        self._keep_spares()
        self._looks += 1
        if self._looks % _REPORT_EVERY == 0:
            network = self._network.read()
            came = {name: now - self._network_before.get(name, 0) for name, now in network.items()}
            self._network_before = network
            self._report_accept_queues(figures, came)
            self._report_syn_queue(came)
            self._report_errors(engine)

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
            if dropped and not came.get("ListenOverflows", dropped):
                self._warn_of_refusals(address, min(dropped, came.get("ListenDrops", 0)))
            elif dropped:
                longest = max((figures[number][1:3] for number in numbers), key=lambda one: one[0])
                recipe = self._places[numbers[0]].recipe
                self._warn_of_drops(address, recipe, dropped, *longest)

    def _warn_of_drops(
        self, address: Address, recipe: Recipe | None, dropped: int, length: int, length_most: int
    ) -> None:
        limit = self._somaxconn
        backlog = self._config.backlog if recipe is None else recipe.backlog
        wanted = max(2 * backlog, 1024)
        help_text = f"--backlog {wanted}"
        if recipe is not None:
            help_text = f"have whoever opened it ask for {wanted} (Backlog= of systemd.socket(5))"
        if wanted > limit:
            help_text += f" and sysctl -w net.core.somaxconn={wanted}"
        log.warning(
            "%s: %d SYNs dropped in the last second, the accept queue was full (now %d of %d; "
            "backlog %d, net.core.somaxconn %d); such clients try again after 1 s, 2 s, ...: %s",
            describe_addresses((address,)),
            dropped,
            length,
            length_most,
            backlog,
            limit,
            help_text,
        )

    def _warn_of_refusals(self, address: Address, dropped: int) -> None:
        if dropped:
            log.warning(
                "%s: %d SYNs dropped in the last second, not for a full accept queue: too many "
                "handshakes under way (net.ipv4.tcp_max_syn_backlog, tcp_syncookies), or no memory",
                describe_addresses((address,)),
                dropped,
            )

    def _report_syn_queue(self, came: Mapping[str, int]) -> None:
        cookies, dropped = (came.get(name, 0) for name in _SYN_QUEUE)
        if cookies or dropped:
            log.warning(
                "a SYN queue was full in the last second: %d SYN cookies sent, %d SYNs dropped (by "
                "all listeners of this network); a flood, or too short a --backlog (%d)",
                cookies,
                dropped,
                self._config.backlog,
            )

    def _report_errors(self, engine: Engine) -> None:
        """One line when a trouble begins; the counters have the rest."""
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
            "descriptors": (tuning.descriptor_limit(),),
            "limit": (self._config.max_connections,),
        }
        for name, text in _TROUBLES.items():
            if errors[name] == self._errors_before.get(name, 0):
                self._quiet_looks[name] = (
                    self._quiet_looks.get(name, _SAY_AGAIN_AFTER) + _REPORT_EVERY
                )
                continue
            if self._quiet_looks.get(name, _SAY_AGAIN_AFTER) >= _SAY_AGAIN_AFTER:
                log.warning(text, *figures.get(name, ()))
            self._quiet_looks[name] = 0
        self._errors_before = errors

    # ---- listening again --------------------------------------------------------------------

    def _reopen(self, engine: Engine, dead: list[int], figures: list[Any]) -> None:
        lost = [number for number in dead if not figures[number][4]]
        replaced = []
        for number in dead:
            place = self._places[number]
            try:
                if number not in lost:  # accept failed strangely; it does listen
                    engine.revive_listener(number, -1)
                    continue
                self._listen_again(engine, number, place)
            except OSError as error:
                self._say_not_reopened(engine, number, place, error)
                continue
            self._not_reopened.pop(number, None)
            replaced.append(number)
            log.warning(
                "%s was closed from outside (SOCK_DESTROY, ss -K): listening again",
                describe_addresses((place.address,)),
            )
        for group in self._groups:
            mine = [number for number in replaced if number in group.cpus]
            if group.lost(lost) or mine:
                self._steer(engine, group, lost, mine)

    def _listen_again(self, engine: Engine, number: int, place: Place) -> None:
        if place.is_unix:
            raise OSError(errno.EINVAL, "a Unix socket is not made again")
        spare = self._spares.pop(place.kind, None)
        with listen_again(
            place.family, place.address, self._config, place.shares, place.recipe, spare
        ) as again:
            engine.revive_listener(number, again.fileno())  # by dup3, which takes no descriptor
        self._keep_spares()

    def _say_not_reopened(self, engine: Engine, number: int, place: Place, error: OSError) -> None:
        if error.errno == errno.EBADF:
            return  # the server has begun to stop
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason += self._why_in_use(engine.listener_fd(number), place)
        if self._not_reopened.get(number) != reason:
            self._not_reopened[number] = reason
            log.error(
                "%s was closed from outside, and cannot be listened on again: %s; trying on",
                describe_addresses((place.address,)),
                reason,
            )

    def _why_in_use(self, fd: int, place: Place) -> str:
        """inet_csk_bind_conflict(): a SO_REUSEPORT group is open to its first socket's user."""
        try:
            owner = os.fstat(fd).st_uid
        except OSError:
            return ""
        if place.shares and owner != os.geteuid():
            return (
                f" by sockets of uid {owner}, whose SO_REUSEPORT group the kernel does not let uid "
                f"{os.geteuid()} join; the others of them serve on; restart the server (under "
                "--dispatch shared there is no group, and --user can listen again)"
            )
        return ""

    def _steer(self, engine: Engine, group: Group, lost: list[int], replaced: list[int]) -> None:
        for number in replaced:
            group.joined(number)
        if any(
            one[3] and number in group.cpus and (number not in lost or number in replaced)
            for number, one in enumerate(engine.listener_figures())
        ):
            group.order = None  # one more has died; before or after those joined is not known
        try:
            if group.order:
                cpus = [group.cpus[number] for number in group.order]
                self._attach_cpu_steering(engine.listener_fd(group.order[0]), cpus)
            elif group.order is None:
                self._steer_without_order(engine, group)
        except OSError as error:
            if error.errno != errno.EBADF:  # the server has begun to stop
                raise

    def _steer_without_order(self, engine: Engine, group: Group) -> None:
        fds = {number: engine.listener_fd(number) for number in group.cpus}
        open_fds = {number: fd for number, fd in fds.items() if fd >= 0}
        if not steer_without_order(group, open_fds) and not self._has_said_by_hash:
            self._has_said_by_hash = True
            log.warning(
                "connections no longer go to the worker of the CPU that handles their SYN, but by "
                "hash: several listeners were closed at once (Linux 6.2 could; or restart)"
            )


_PAUSING = ("accept", "descriptors", "memory", "listener")  # errors upon which accepting pauses
_TROUBLES = {
    "descriptors": "no descriptor is left for another client (RLIMIT_NOFILE %d, or fs.file-max): "
    "accepting pauses until one is closed; ulimit -n, or --max-connections",
    "memory": "the kernel has no memory for another socket or buffer: accepting pauses",
    "limit": "--max-connections %d is reached: further clients wait in the accept queue",
    "evicted": "--max-buffer-memory is reached: clients that do not read are reset, the slowest "
    "first",
}

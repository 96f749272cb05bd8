"""percpu: which worker runs on which CPU, and how it gets the clients whose packets come there."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .addresses import Address
from .config import ServerConfig
from .cpus import usable_cpus
from .kernel import VERSION
from .listen import Listener

if TYPE_CHECKING:
    from .listen_udp import Datagrams

__all__ = ["Group", "cpus_of_workers", "steer", "steer_without_order"]

_SO_DETACH_REUSEPORT_BPF = 68  # <asm-generic/socket.h>, Linux 5.3
# Before, a group's choice does not look at SO_INCOMING_CPU.
_CHOOSES_BY_INCOMING_CPU = VERSION >= (6, 2)

log = logging.getLogger("kecho")


def cpus_of_workers(config: ServerConfig, thread_count: int) -> list[int | None]:
    """The CPU that each worker is pinned to; None: not pinned."""
    if config.dispatch == "shared":
        return [None] * thread_count
    cpus = usable_cpus()
    return [cpus[index % len(cpus)] for index in range(thread_count)]


@dataclass
class Group:
    """The sockets of one address that the kernel chooses from, by the CPU of the SYN.

    order: the listeners' numbers, as they stand in the kernel's group, which classic BPF's answer
    is an index of; None: not known. cpus: of each listener, by its number.
    """

    order: list[int] | None
    cpus: dict[int, int]

    def lost(self, numbers: Sequence[int]) -> bool:
        """These have died, or had before; whether that has changed anything.

        The kernel puts the last socket in the place of one that leaves, and a new one at the end:
        reuseport_detach_sock() in net/core/sock_reuseport.c, Linux 6.18. In which order several
        have left is not known, and so neither is where the others stand.
        """
        if self.order is None:
            return any(number in self.cpus for number in numbers)
        gone = [number for number in numbers if number in self.order]
        if len(gone) == len(self.order):
            self.order = []
        elif len(gone) > 1:
            self.order = None
        elif gone:
            place = self.order.index(gone[0])
            last = self.order.pop()
            if last != gone[0]:
                self.order[place] = last
        return bool(gone)

    def joined(self, number: int) -> None:
        """Its replacement listens."""
        if self.order is not None:
            self.order.append(number)


def steer_without_order(group: Group, fds: Mapping[int, int]) -> bool:
    """Has the kernel look at each socket's own CPU instead of running a program, for which it has
    to be Linux 6.2; False: it is older, and connections go by its hash. fds: by number."""
    for number, fd in fds.items():
        one = socket.socket(fileno=fd)  # the engine's
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU, group.cpus[number])
            with suppress(OSError):  # ENOENT: there is no program; ENOPROTOOPT: before Linux 5.3
                one.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
        finally:
            one.detach()
    return _CHOOSES_BY_INCOMING_CPU


def steer(
    config: ServerConfig,
    listeners: Sequence[Listener],
    datagrams: Sequence[Datagrams],
    cpus: Sequence[int | None],
    attach: Callable[[int, list[int]], None],
) -> list[Group]:
    """Has each CPU's connections and datagrams go to the worker pinned there; returns a group for
    each TCP address. attach: _engine.attach_cpu_steering.

    Not with --reuse-port: other processes' sockets are in the same group, and the program would
    give them nothing. Nor with several workers on one CPU, of which only one would get anything.
    The kernel's hash spreads the connections then. Nor inherited ones, whose order in their group
    is not known.
    """
    pinned = [cpu for cpu in cpus if cpu is not None]
    if len(pinned) < 2:
        return []
    if config.reuse_port or len(set(pinned)) < len(pinned):
        log.warning(
            "dispatch: percpu spreads connections by hash and not by CPU %s",
            "with --reuse-port" if config.reuse_port else "with more threads than CPUs",
        )
        return []
    groups: dict[Address, Group] = {}
    for number, listener in enumerate(listeners):
        if not listener.is_unix and not listener.inherited:
            group = groups.setdefault(listener.address, Group([], {}))
            group.joined(number)
            group.cpus[number] = pinned[listener.queue]
    first = [listeners[min(group.cpus)].socket for group in groups.values()]
    first += [one.socket for one in datagrams if one.worker == 0]
    for one in first:
        attach(one.fileno(), pinned)
    return list(groups.values())

"""percpu: which worker runs on which CPU, and how it gets the clients whose packets come there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ServerConfig
from .cpus import usable_cpus
from .listen import Address, Listener

if TYPE_CHECKING:
    from .listen_udp import Datagrams

__all__ = ["Group", "cpus_of_workers", "steer"]

log = logging.getLogger("kecho")


def cpus_of_workers(config: ServerConfig, thread_count: int) -> list[int | None]:
    """The CPU that each worker is pinned to; None: not pinned."""
    if config.dispatch == "shared":
        return [None] * thread_count
    cpus = usable_cpus()
    return [cpus[index % len(cpus)] for index in range(thread_count)]


@dataclass
class Group:
    """The sockets of one address that classic BPF chooses from, by the CPU of the SYN.

    order: the listeners' numbers, as they stand in the kernel's group; cpus: of each listener, by
    its number.
    """

    order: list[int]
    cpus: dict[int, int]

    def replaced(self, numbers: Sequence[int]) -> bool:
        """These have died, and their replacements have joined in this order. False: where they
        stand is not known.

        The kernel puts the last socket in the place of one that leaves, and a new one at the end:
        reuseport_detach_sock() in net/core/sock_reuseport.c, Linux 6.18.
        """
        if set(numbers) == set(self.order):
            self.order = list(numbers)
            return True
        if len(numbers) != 1:
            return False
        place = self.order.index(numbers[0])
        self.order[place] = self.order[-1]
        self.order[-1] = numbers[0]
        return True


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
            group.order.append(number)
            group.cpus[number] = pinned[listener.queue]
    first = [listeners[group.order[0]].socket for group in groups.values()]
    first += [one.socket for one in datagrams if one.worker == 0]
    for one in first:
        attach(one.fileno(), pinned)
    return list(groups.values())

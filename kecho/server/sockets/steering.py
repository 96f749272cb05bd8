"""percpu: which worker runs on which CPU, and how it gets the clients whose packets come there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...system.cpus import usable_cpus
from ..config import ServerConfig
from .listen import Listener

if TYPE_CHECKING:
    from .udp import Datagrams

__all__ = ["cpus_of_workers", "steer"]

log = logging.getLogger("kecho")


def cpus_of_workers(config: ServerConfig, thread_count: int) -> list[int | None]:
    """The CPU that each worker is pinned to; None: not pinned."""
    if config.dispatch == "shared":
        return [None] * thread_count
    cpus = usable_cpus()
    return [cpus[index % len(cpus)] for index in range(thread_count)]


def steer(
    config: ServerConfig,
    listeners: Sequence[Listener],
    datagrams: Sequence[Datagrams],
    cpus: Sequence[int | None],
    attach: Callable[[int, list[int]], None],
) -> None:
    """Has each CPU's connections and datagrams go to the worker pinned there.
    attach: _engine.attach_cpu_steering.

    Not with --reuse-port: other processes' sockets are in the same group, and the program would
    give them nothing. Nor with several workers on one CPU, of which only one would get anything.
    The kernel's hash spreads the connections then. Nor inherited ones, whose order in their group
    is not known.
    """
    pinned = [cpu for cpu in cpus if cpu is not None]
    if len(pinned) < 2:
        return
    if config.reuse_port or len(set(pinned)) < len(pinned):
        log.warning(
            "dispatch: percpu spreads connections by hash and not by CPU %s",
            "with --reuse-port" if config.reuse_port else "with more threads than CPUs",
        )
        return
    first = [
        one.socket for one in listeners if one.queue == 0 and not one.is_unix and not one.inherited
    ]
    first += [one.socket for one in datagrams if one.worker == 0]
    for one in first:
        attach(one.fileno(), pinned)

"""--busy-poll: for how long a worker polls, and what is said where that cannot be a gain."""

from __future__ import annotations

import logging

from ..system.cpus import whole_cpu_count
from .config import ServerConfig

__all__ = ["busy_poll_of"]

FOREVER_NS = 2**64 - 1
# A client that waits for each echo leaves gaps of 20 to 150 us, its own wake-up included.
AUTO_NS = 200_000

log = logging.getLogger("kecho")


def busy_poll_of(config: ServerConfig, thread_count: int) -> tuple[int, bool]:
    """For so many ns; whether only while events are that close together."""
    if config.busy_poll == 0:
        return 0, False
    cpus = whole_cpu_count()
    if config.busy_poll == "auto":
        if thread_count > cpus:
            log.warning("busy-poll: auto does not poll: %s", _why(thread_count, cpus))
            return 0, False
        return AUTO_NS, True
    if thread_count > cpus:
        log.warning(
            "busy-poll: threads that poll keep others waiting: %s", _why(thread_count, cpus)
        )
    return FOREVER_NS if config.busy_poll == "forever" else config.busy_poll * 1000, False


def _why(thread_count: int, cpus: int) -> str:
    return f"{thread_count} threads and {cpus} whole CPUs (affinity, cgroup quota)"

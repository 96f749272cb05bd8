"""--engine io_uring and auto: whether the workers can have rings."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from ...errors import EngineError
from ...system.kernel import RELEASE, VERSION
from ..config import ServerConfig

__all__ = ["ring_entries"]

_OLDEST_KERNEL = (6, 1)
_ENTRIES = 4096  # 320 KiB of the kernel's memory for each ring


log = logging.getLogger("kecho")


def ring_entries(config: ServerConfig, try_io_uring: Callable[[int], None]) -> int:
    """How many the workers' rings are to have, 0 where io_uring is not the engine.

    try_io_uring: the engine's. Raises EngineError if io_uring was asked for and cannot be had. With
    auto, a line says why it is epoll.
    """
    if config.engine not in ("io_uring", "auto"):
        return 0
    try:
        return _tried(config, try_io_uring)
    except EngineError as error:
        if config.engine == "io_uring":
            raise
        log.info("engine: epoll, since io_uring is not available: %s", error.reason)
        return 0


def _tried(config: ServerConfig, try_io_uring: Callable[[int], None]) -> int:
    if config.busy_poll != 0:
        raise EngineError(None, "it does not poll (--busy-poll)")
    if VERSION < _OLDEST_KERNEL:
        oldest = ".".join(map(str, _OLDEST_KERNEL))
        raise EngineError(None, f"io_uring takes Linux {oldest} or newer, this is {RELEASE}")
    try:
        try_io_uring(_ENTRIES)
    except OSError as error:
        raise EngineError(error.errno, f"{error.strerror}{_advice(error)}") from None
    return _ENTRIES


def _advice(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "; sysctl kernel.io_uring_disabled, or what confines this process, forbids it"
    if error.errno == errno.ENOSYS:
        return "; this kernel has no io_uring (CONFIG_IO_URING)"
    return ""

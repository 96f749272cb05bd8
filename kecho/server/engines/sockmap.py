"""--engine sockmap: has the kernel echo TCP connections."""

from __future__ import annotations

import errno
import logging
import resource

from ...errors import EngineError
from ...system import sysctl
from ...system.kernel import RELEASE, VERSION
from ..config import ServerConfig

__all__ = ["load", "open_flows"]

_BTF = "/sys/kernel/btf/vmlinux"
# Before, skbs that were passed to user space could overtake those that were redirected, and bytes
# be lost: the "bpf sockmap fixes" of 2023.
_OLDEST_KERNEL = (6, 5)
_LINES_OF_LOG = 40
_CAPACITY_LEAST = 1024
_CAPACITY_MOST = 1 << 20

log = logging.getLogger("kecho")


def open_flows(config: ServerConfig, *, has_unix: bool) -> tuple[int, ...]:
    """The descriptors of the kernel's echo for an Engine, which are the caller's; () where the
    workers echo.

    has_unix: a Unix socket is among the listeners. Raises EngineError if the kernel cannot echo.
    """
    if config.engine != "sockmap":
        return ()
    if has_unix or config.udp:
        raise EngineError(
            None, f"TCP alone: the kernel does not echo {'Unix sockets' if has_unix else 'UDP'}"
        )
    return _open(_capacity(config))


def _open(capacity: int) -> tuple[int, ...]:
    if VERSION < _OLDEST_KERNEL:
        oldest = ".".join(map(str, _OLDEST_KERNEL))
        raise EngineError(None, f"it takes Linux {oldest} or newer, this is {RELEASE}")
    try:
        with open(_BTF, "rb") as file:
            btf = file.read()
    except OSError as error:
        reason = f"{_BTF} (CONFIG_DEBUG_INFO_BTF): {error.strerror}"
        raise EngineError(error.errno, reason) from None
    return load(btf, capacity)


def load(btf: bytes, capacity: int) -> tuple[int, ...]:
    """btf: how the kernel describes itself. Raises EngineError; what the kernel says about a
    program that it refuses is logged."""
    from .._bpf import open_echo

    try:
        return open_echo(btf, capacity)
    except LookupError as error:
        raise EngineError(None, f"{_BTF}: {error.args[0]}") from None
    except OSError as error:
        if said := getattr(error, "verifier_log", ""):
            last = "\n".join(said.splitlines()[-_LINES_OF_LOG:])
            log.error("what the kernel says about the program, in the end:\n%s", last)
        raise EngineError(error.errno, f"{error.strerror}{_advice(error)}") from None


def _advice(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "; it takes root, or CAP_BPF and CAP_NET_ADMIN"
    if error.errno == errno.ENOSYS:
        return "; this kernel has no bpf(2) (CONFIG_BPF_SYSCALL)"
    if error.errno == errno.EINVAL and "SOCKHASH" in str(error.strerror):
        return "; this kernel has no sockmap (CONFIG_BPF_STREAM_PARSER)"
    return ""


def _capacity(config: ServerConfig) -> int:
    """Connections that the maps have room for; further ones are echoed by the workers. The hash
    table of the sockets has so many buckets from the start, 16 bytes each."""
    most = sysctl.descriptor_limit()
    if most == resource.RLIM_INFINITY:
        most = _CAPACITY_MOST
    if config.max_connections is not None:
        most = min(most, config.max_connections)
    return min(max(most, _CAPACITY_LEAST), _CAPACITY_MOST)

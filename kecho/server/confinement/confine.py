"""What the command gives up between the opening of its sockets and the first client."""

from __future__ import annotations

import logging
import os
import stat
from typing import Protocol

from ...null import open_null
from ...options import is_abstract
from . import privileges, sandbox

__all__ = ["confine"]

log = logging.getLogger("kecho")


class Confined(Protocol):
    """What is used of the command's configuration."""

    @property
    def fd(self) -> tuple[int, ...]: ...
    @property
    def uds(self) -> str | None: ...
    @property
    def udp(self) -> bool: ...
    @property
    def sandbox(self) -> bool | None: ...


def confine(config: Confined, identity: privileges.Identity | None, *, engine: str) -> None:
    """What the command gives up between the opening of its sockets and the first client.

    engine: who echoes.
    """
    for fd in config.fd:
        _let_go(fd)
    sandbox.prepare()
    path = None if config.uds is None or is_abstract(config.uds) else config.uds
    if identity is not None:
        privileges.become(identity)
        if path is not None:
            _warn_of_file_left(path)
    if config.sandbox is False:
        return
    if identity is None:
        privileges.give_up_capabilities()
    reasons = sandbox.enter(
        socket_path=path,
        serves_udp=config.udp,
        engine=engine,
    )
    if reasons and config.sandbox:
        raise OSError(None, f"--sandbox: {'; '.join(reasons)}")
    if reasons:
        # Whoever runs a build with a sanitizer knows it.
        level = logging.DEBUG if sandbox.IS_SANITIZED else logging.WARNING
        log.log(level, "sandbox: %s; --no-sandbox leaves out this line", "; ".join(reasons))


def _let_go(fd: int) -> None:
    """Closes an inherited descriptor, of which the server has a duplicate: otherwise clients would
    wait at it while the server drains."""
    if fd > 2:
        os.close(fd)
        return
    devnull_fd = open_null()
    os.dup2(devnull_fd, fd)
    os.close(devnull_fd)


def _warn_of_file_left(path: str) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    facts = os.stat(directory)
    is_sticky = facts.st_mode & stat.S_ISVTX and os.geteuid() != facts.st_uid
    if is_sticky or not os.access(directory, os.W_OK | os.X_OK):
        log.warning("uds: %r will be left behind: the user may not write to its directory", path)

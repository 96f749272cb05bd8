"""What keeps the command from looking or dropping: one line and an exit status."""

from __future__ import annotations

import errno

from .. import command
from . import outcome as outcomes
from .diag import Diag, is_unavailable

__all__ = ["Absent", "Failure", "of_kernel", "open_diag"]


class Failure(Exception):
    """A line for the user, and the exit status that it makes."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


class Absent(Failure):
    """What was named is not there: a namespace or a device, which may be made again."""


def _of_opening(error: OSError, netns: str | None) -> Failure:
    """Why there is no Diag."""
    text = error.strerror or str(error)
    named = f"--netns {netns}: {text}" if netns else text
    if isinstance(error, PermissionError):
        return Failure(named, outcomes.EXIT_NO_PERMISSION)
    if netns and error.errno in (errno.ENOENT, errno.ESRCH, errno.EINVAL):
        return Failure(named, command.EXIT_USAGE)
    return of_kernel(error)


def of_kernel(error: OSError) -> Failure:
    """What the netlink socket answered."""
    text = error.strerror or str(error)
    if isinstance(error, PermissionError):
        return Failure(f"{text}: {outcomes.NO_PERMISSION}", outcomes.EXIT_NO_PERMISSION)
    if is_unavailable(error):
        return Failure(f"{text}: {outcomes.NO_SOCK_DIAG}", outcomes.EXIT_UNSUPPORTED)
    return Failure(text, outcomes.EXIT_NOT_DROPPED)


def open_diag(netns: str | None) -> Diag:
    """Raises Failure."""
    try:
        return Diag(netns)
    except OSError as error:
        raise _of_opening(error, netns) from None

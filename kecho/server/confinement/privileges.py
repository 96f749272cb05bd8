"""--user: from root to somebody else, for good, once the sockets are open."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import OptionError
from ...system.users import find_group, find_user
from .. import _sandbox

__all__ = ["Identity", "become", "find_identity", "give_up_capabilities"]


@dataclass(frozen=True)
class Identity:
    """Who the process is to become.

    groups: the supplementary ones.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def find_identity(text: str) -> Identity:
    """Of ``NAME``, ``NAME:GROUP``, ``uid`` or ``uid:gid``. Raises OptionError.

    Without a group it is the user's own, with the supplementary groups that the user is in; a
    group that is given is the only one.
    """
    user, colon, group = text.partition(":")
    try:
        uid, gid, name = find_user(user)
        if colon:
            gid = find_group(group)
        elif gid is None:
            raise ValueError(
                f"user {uid} is not in the password database: name a group as well, {uid}:N"
            )
    except ValueError as error:
        raise OptionError("user", str(error)) from None
    assert gid is not None
    if uid == 0:
        raise OptionError("user", f"{user} is root, who keeps every privilege")
    groups = os.getgrouplist(name, gid) if name is not None and not colon else []
    return Identity(uid, gid, tuple(sorted({*groups} - {gid})))


def become(identity: Identity) -> None:
    """Changes the user and groups of the process, every id of each kind, and gives up its session's
    keyring and all capabilities. Raises OSError that names the system call, or says that it did
    not hold."""
    groups = sorted({identity.gid, *identity.groups})
    _sandbox.leave_session_keyring()
    _call("setgroups", lambda: os.setgroups(groups))
    _call("setresgid", lambda: os.setresgid(*[identity.gid] * 3))
    # While root still has the capability that it takes.
    _sandbox.drop_bounding_set()
    _call("setresuid", lambda: os.setresuid(*[identity.uid] * 3))
    # The kernel does this at a change from root, unless a "securebit" says otherwise, and not for
    # others who were allowed to change: capabilities(7).
    give_up_capabilities()
    _verify(identity, groups)


def give_up_capabilities() -> None:
    """Every capability, and what a set-user-ID program would give: none of it comes back."""
    _sandbox.drop_bounding_set()
    _sandbox.drop_capabilities()
    _sandbox.set_no_new_privileges()


def _verify(identity: Identity, groups: list[int]) -> None:
    became = os.getresuid(), os.getresgid(), sorted(os.getgroups())
    if became != ((identity.uid,) * 3, (identity.gid,) * 3, groups):
        raise OSError(errno.EPERM, f"the system did not become user {identity}: {became}")
    ways_back: list[Callable[[], None]] = [
        lambda: os.setresuid(0, 0, 0),
        lambda: os.setreuid(-1, 0),
        lambda: os.setgroups([]),
    ]
    if identity.gid != 0:
        ways_back.append(lambda: os.setresgid(0, 0, 0))
    for way_back in ways_back:
        try:
            way_back()
        except PermissionError:
            continue
        raise OSError(errno.EPERM, "privileges were dropped, and could be had back")


def _call(name: str, call: Callable[[], None]) -> None:
    try:
        call()
    except OSError as error:
        why = "; --user takes root, or CAP_SETUID and CAP_SETGID" * (error.errno == errno.EPERM)
        raise OSError(error.errno, f"{name}: {error.strerror}{why}") from None

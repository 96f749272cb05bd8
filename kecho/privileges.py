"""--user: from root to somebody else, for good, once the sockets are open."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from . import _sandbox
from .errors import OptionError

__all__ = ["Identity", "become", "find_identity", "find_owner", "give_up_capabilities"]

_ID_MOST = 2**32 - 2  # the one above means "leave it as it is": setresuid(2)


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
        uid, gid, name = _find_user(user)
        if colon:
            gid = _find_group(group)
        elif gid is None:
            raise ValueError(f"user {uid} is in no password database: say the group, too, {uid}:N")
    except ValueError as error:
        raise OptionError("user", str(error)) from None
    assert gid is not None
    if uid == 0:
        raise OptionError("user", f"{user} is root, who keeps every privilege")
    groups = os.getgrouplist(name, gid) if name is not None and not colon else []
    return Identity(uid, gid, tuple(sorted({*groups} - {gid})))


def find_owner(text: str) -> tuple[int, int]:
    """uid and gid of ``USER``, ``USER:GROUP`` or ``:GROUP``; -1: it stays. Raises ValueError."""
    user, _, group = text.partition(":")
    return _find_user(user)[0] if user else -1, _find_group(group) if group else -1


def _find_user(text: str) -> tuple[int, int | None, str | None]:
    """uid, gid and name, the last two if they are known. Raises ValueError."""
    import pwd

    try:
        # A name that is a number is a name to the C library, too.
        found = pwd.getpwnam(text)
    except KeyError:
        uid = _number(text, "user")
        try:
            found = pwd.getpwuid(uid)
        except KeyError:
            return uid, None, None
    return found.pw_uid, found.pw_gid, found.pw_name


def _find_group(text: str) -> int:
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        return _number(text, "group")


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"there is no {what} {text!r}")
    if len(text) > 10 or int(text) > _ID_MOST:
        raise ValueError(f"{what} {text} is not between 0 and {_ID_MOST}")
    return int(text)


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

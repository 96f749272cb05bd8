"""Users and groups by name or number: passwd(5), group(5)."""

from __future__ import annotations

__all__ = ["find_group", "find_owner", "find_user"]

_ID_MOST = 2**32 - 2  # the one above means "leave it as it is": setresuid(2)


def find_owner(text: str) -> tuple[int, int]:
    """uid and gid of ``USER``, ``USER:GROUP`` or ``:GROUP``; -1: it stays. Raises ValueError."""
    user, _, group = text.partition(":")
    return find_user(user)[0] if user else -1, find_group(group) if group else -1


def find_user(text: str) -> tuple[int, int | None, str | None]:
    """uid, gid and name of a name or uid; the last two None if unknown. Raises ValueError."""
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


def find_group(text: str) -> int:
    """gid of a name or gid. Raises ValueError."""
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

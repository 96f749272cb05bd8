"""Turn text into the values of the server's options, and check them: what no other command has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..options import integer

__all__ = [
    "check_busy_poll",
    "check_fds",
    "check_hosts",
    "check_mode",
    "check_owner",
    "check_user",
    "parse_busy_poll",
    "parse_fds",
    "parse_hosts",
    "parse_mode",
]

LONGEST_BUSY_POLL_US = 1_000_000


def parse_hosts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def check_hosts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"must be an address or several (got {value!r})")
    hosts = tuple(value)
    for host in hosts:
        if not isinstance(host, str) or not host or "\0" in host:
            raise ValueError(f"must be an address or a name (got {host!r})")
    return hosts


_FD = integer("a descriptor", 0, 2**31 - 1)


def parse_fds(text: str) -> tuple[int, ...]:
    return tuple(_FD.parse(part.strip()) for part in text.split(","))


def check_fds(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"must be a descriptor or several (got {value!r})")
    # On the command line, each descriptor is a text of its own.
    fds = tuple(_FD.check(_FD.parse(fd) if isinstance(fd, str) else fd) for fd in value)
    seen: set[int] = set()
    for fd in fds:
        if fd in seen:
            raise ValueError(f"must be different descriptors (got {fd} twice)")
        seen.add(fd)
    return fds


_MODE = integer("permissions", 0, 0o777, optional=True)


def check_mode(value: object) -> int | None:
    mode: int | None = _MODE.check(value)
    return mode


def parse_mode(text: str) -> int:
    if not text or len(text) > 4 or text.strip("01234567") or int(text, 8) > 0o777:
        raise ValueError(f"must be an octal number such as 660 (got {text!r})")
    return int(text, 8)


def check_owner(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.replace(":", "", 1) or "\0" in value:
        raise ValueError(f"must be USER, USER:GROUP or :GROUP (got {value!r})")
    return value


def check_user(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"must be the name or the number of a user (got {value!r})")
    return value


_MICROSECONDS = integer("how long", 0, LONGEST_BUSY_POLL_US)
_BUSY_POLL_WORDS = ("auto", "forever")


def parse_busy_poll(text: str) -> int | str:
    if text in _BUSY_POLL_WORDS:
        return text
    try:
        return int(_MICROSECONDS.parse(text))
    except ValueError:
        words = " or ".join(_BUSY_POLL_WORDS)
        raise ValueError(f"must be a number of microseconds, {words} (got {text!r})") from None


def check_busy_poll(value: object) -> object:
    return value if value in _BUSY_POLL_WORDS else _MICROSECONDS.check(value)

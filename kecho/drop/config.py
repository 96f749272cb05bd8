"""The options of the command: each one is defined here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..options import Option, check_fields, option, seconds, switch
from .netns import check_namespace
from .process import PID_MOST
from .ranges import parse_range
from .states import parse_state

__all__ = ["PASSES_MOST", "DropConfig"]

PASSES_MOST = 100  # of --until-empty


def _repeatable(
    help: str, parse: Callable[[str], Any], metavar: str, letter: str | None = None
) -> Option:
    def check(values: object) -> object:
        assert isinstance(values, tuple)
        for one in values:
            parse(one)
        return values

    return Option(help, str, check, metavar, repeatable=True, letter=letter)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 1 << 32):
        raise ValueError(f"{text[:40]!r} is not a whole number, 0 to 4294967295")
    return int(text)


def _pid(text: str) -> int:
    if not 0 < _number(text) <= PID_MOST:
        raise ValueError(f"{text} is not the number of a process, 1 to {PID_MOST}")
    return int(text)


def _optional_name(value: object) -> object:
    return value if value is None else check_namespace(str(value))


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """The options of the command."""

    state: tuple[str, ...] = option(
        (),
        _repeatable(
            "states by their names in ss, such as time-wait or fin-wait-1,fin-wait-2, or all,"
            " connected, synchronized, bucket, big; may be given again",
            parse_state,
            "STATE",
        ),
    )
    local: tuple[str, ...] = option(
        (),
        _repeatable(
            "the local end: address, prefix/length, port, :port, :low-high, address:port or"
            " [ipv6]:port, with the device that the socket is bound to (most are bound to none) as"
            " address%eth0 or %eth0; may be given again",
            parse_range,
            "END",
        ),
    )
    peer: tuple[str, ...] = option(
        (), _repeatable("the peer's end, the same way; may be given again", parse_range, "END")
    )
    not_local: tuple[str, ...] = option(
        (),
        _repeatable(
            "not with this local end, the same way; a device has to be there; may be given again",
            parse_range,
            "END",
        ),
    )
    not_peer: tuple[str, ...] = option(
        (),
        _repeatable(
            "not with this end of the peer's, the same way; a device has to be there; may be given"
            " again",
            parse_range,
            "END",
        ),
    )
    pid: tuple[str, ...] = option(
        (), _repeatable("held by this process; may be given again", _pid, "PID")
    )
    uid: tuple[str, ...] = option(
        (),
        _repeatable(
            "owned by this user's id; what nobody owns (time-wait) is never matched; may be"
            " given again",
            _number,
            "UID",
        ),
    )
    idle: float | None = option(
        None,
        seconds(
            "has neither sent nor received data for so long; keepalive is no data", optional=True
        ),
    )
    listeners: bool = option(False, switch("listening sockets, too; otherwise never"))
    list: bool = option(False, switch("only show what matches"))
    dry_run: bool = option(False, switch("say what would be dropped, and drop nothing"))
    until_empty: bool = option(
        False, switch(f"repeat until a look finds nothing, {PASSES_MOST} times at most")
    )
    watch: float | None = option(
        None, seconds("drop what matches so often, until SIGINT or SIGTERM", optional=True)
    )
    json: bool = option(False, switch("print a JSON object (with --watch one for each look)"))
    quiet: bool = option(
        False,
        Option(
            "print errors only",
            switch("").parse,
            switch("").check,
            None,
            value_if_bare="1",
            letter="q",
        ),
    )
    netns: str | None = option(
        None,
        Option(
            "work in this network namespace: a name of ip-netns(8), a path such as"
            " /proc/PID/ns/net, or the PID of a process in it (pid:N where a name is a number)",
            str,
            _optional_name,
            "NAME",
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)

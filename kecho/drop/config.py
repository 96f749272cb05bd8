"""Define the options of the command, each one once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..options import Option, check_fields, configuration, option, seconds, switch
from .netns import check_namespace
from .process import PID_MOST
from .ranges import parse_range
from .states import parse_state

__all__ = ["FILTERS", "PASSES_MOST", "DropConfig"]

PASSES_MOST = 100  # of --until-empty

# The headings of --help.
FILTERS, RUNNING, OUTPUT = "Filters", "Running", "Output"


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
        raise ValueError(f"must be a whole number from 0 to 4294967295 (got {text[:40]!r})")
    return int(text)


def _pid(text: str) -> int:
    if not 0 < _number(text) <= PID_MOST:
        raise ValueError(f"must be a process id from 1 to {PID_MOST} (got {text})")
    return int(text)


def _optional_name(value: object) -> object:
    return value if value is None else check_namespace(str(value))


@configuration
class DropConfig:
    """The options of the command."""

    state: tuple[str, ...] = option(
        _repeatable(
            "State as in ss: time-wait, or all, connected, synchronized, bucket, big; repeatable.",
            parse_state,
            "STATE",
        ),
        FILTERS,
        default=(),
    )
    local: tuple[str, ...] = option(
        _repeatable("Local address or port: see END below; repeatable.", parse_range, "END"),
        FILTERS,
        default=(),
    )
    peer: tuple[str, ...] = option(
        _repeatable("Peer's address or port: see END below; repeatable.", parse_range, "END"),
        FILTERS,
        default=(),
    )
    not_local: tuple[str, ...] = option(
        _repeatable("Leave out this local address or port; repeatable.", parse_range, "END"),
        FILTERS,
        default=(),
    )
    not_peer: tuple[str, ...] = option(
        _repeatable("Leave out this address or port of the peer; repeatable.", parse_range, "END"),
        FILTERS,
        default=(),
    )
    pid: tuple[str, ...] = option(
        _repeatable("Held by this process; repeatable.", _pid, "PID"), FILTERS, default=()
    )
    uid: tuple[str, ...] = option(
        _repeatable(
            "Owned by this user id; repeatable. A time-wait socket has no owner and never matches.",
            _number,
            "UID",
        ),
        FILTERS,
        default=(),
    )
    idle: float | None = option(
        seconds(
            "Has neither sent nor received data for this long. Keepalive probes are not data.",
            optional=True,
        ),
        FILTERS,
        default=None,
    )
    listeners: bool = option(
        switch("Listening sockets as well; otherwise they never match."), FILTERS, default=False
    )
    list: bool = option(switch("Show what matches, and drop nothing."), RUNNING, default=False)
    dry_run: bool = option(
        switch("Say what would be dropped, and drop nothing."), RUNNING, default=False
    )
    until_empty: bool = option(
        switch(f"Repeat until nothing matches, at most {PASSES_MOST} times."),
        RUNNING,
        default=False,
    )
    watch: float | None = option(
        seconds("Drop what matches every SECONDS, until SIGINT or SIGTERM.", optional=True),
        RUNNING,
        default=None,
    )
    netns: str | None = option(
        Option(
            "Work in this network namespace: a name, a path, or a PID (pid:N if N is also a name).",
            str,
            _optional_name,
            "NAME",
        ),
        RUNNING,
        default=None,
    )
    json: bool = option(
        switch("Print a JSON object; with --watch, one for each look."), OUTPUT, default=False
    )
    quiet: bool = option(replace(switch("Print errors only."), letter="q"), OUTPUT, default=False)

    def __post_init__(self) -> None:
        check_fields(self)

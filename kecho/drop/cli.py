"""kecho-drop: drops the TCP sockets it is told, and no others.

Outcomes and lists go to stdout, a summary and errors to stderr. Exit statuses: EPILOG.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, BinaryIO

from .. import command
from .._version import __version__
from ..errors import OptionError
from ..options import flag, options_of
from .config import DropConfig
from .devices import as_name
from .ending import Ending
from .filters import Filter, make_filter
from .lines import ends_of
from .pairs import Pair, PairError, make_pair, pairs_in, parse_endpoint
from .table import PairTable
from .work import PROGRAM, work

__all__ = ["main"]

INPUT_BYTES_MOST = 64 << 20
LINE_BYTES_MOST = 1 << 20

DESCRIPTION = """\
Drops TCP sockets (TCP only): the pairs that are given, as netstat and ss print them (the local
address first, then the peer's), or lines of such pairs on standard input, also whole lines of ss,
netstat -np, lsof -nPi and /proc/net/tcp, or what the filters match. With both, the pairs that match
the filters; standard input is then read only for -, and without - it has to be a terminal, closed
or </dev/null, so that pairs in it are never passed over. The whole input is read first: if a line
is wrong, nothing is dropped."""
EPILOG = """\
Exit status: 0 all were dropped (or, with --list and --dry-run, something matches); 1 nothing
matched, or some were gone already; 2 wrong usage or a wrong line; 3 some were not dropped (refused,
protected or not tried, or more came than --until-empty would drop), or the output was lost (a full
disk, a closed pipe); 4 no permission: dropping needs
CAP_NET_ADMIN (sudo, setcap cap_net_admin+ep, or capsh --addamb=cap_net_admin), --netns
CAP_SYS_ADMIN, too; or what was asked for cannot be seen: a process of another user, hidden by
hidepid, in another network namespace, or without /proc; 5 the kernel cannot: it needs
CONFIG_INET_DIAG_DESTROY (Linux 4.9) and Linux 6.0 for time-wait; 128 + N: signal N (SIGINT,
SIGTERM, SIGHUP) came before the end; it ends --watch with one of the others. --list needs no
privilege.

As root, run the command kecho-drop, or python -P -m kecho.drop: without -P, python -m takes modules
from the current directory, whoever has put them there."""


OPTIONS = options_of(DropConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run(PROGRAM, _main, arguments)


def _usage(text: str) -> int:
    command.say_error(PROGRAM, f"{text} (--help lists the options)")
    return command.EXIT_USAGE


def _main(arguments: Sequence[str]) -> int:
    ending = Ending()
    try:
        with ending.heard():
            return _run(arguments, ending)
    except KeyboardInterrupt:
        if ending.number is None:
            raise
        return 128 + ending.number


def _run(arguments: Sequence[str], ending: Ending) -> int:
    flags = vars(_parser().parse_args(arguments))
    words, families = flags.pop("pairs"), {flags.pop("v4"), flags.pop("v6")} - {0}
    try:
        config = _config(flags)
        wanted = _filter(config, families)
        if config.list and (config.dry_run or config.until_empty or config.watch):
            raise OptionError("--list", "does not go with --dry-run, --until-empty or --watch")
        if config.dry_run and config.until_empty:
            raise OptionError("--dry-run", "does not go with --until-empty")
        has_filter = bool(config.pid) or wanted.narrows or (config.list and not wanted.is_empty)
        lists_all = config.list and not words and not has_filter and not _may_be_fed_pairs()
        pairs = _pairs(words, has_filter)
        if pairs is None and has_filter and not config.list and _may_be_fed_pairs():
            raise OptionError(
                "standard input",
                "is neither a terminal nor /dev/null, and there is a filter: - drops the pairs in "
                "it that match the filter, </dev/null all that matches",
            )
    except OptionError as error:
        return _usage(str(error))
    except PairError as error:
        what = f"standard input, {error}" if error.line else str(error)
        command.say_error(PROGRAM, f"{what}; nothing was dropped")
        return command.EXIT_USAGE
    if pairs is None and not has_filter and not lists_all:
        return _usage("neither pairs nor a filter that narrows: what is to be dropped?")
    return work(config, pairs, wanted, ending)


def _parser() -> command.Parser:
    parser = command.Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "pairs",
        nargs="*",
        default=[],
        metavar="LOCAL PEER",
        help="pairs such as 127.0.0.1:36986 127.0.0.1:12345 or [::1]:80 [::1]:9; - alone:"
        " standard input, which is also read when there is neither a pair nor a filter",
    )
    parser.add_argument(
        "-4", dest="v4", action="store_const", const=4, default=0,
        help="IPv4 only, also on IPv6 sockets (v4-mapped); alone only with --list",
    )  # fmt: skip
    parser.add_argument(
        "-6",
        dest="v6",
        action="store_const",
        const=6,
        default=0,
        help="IPv6 only; alone only with --list",
    )
    command.add_options(
        parser, OPTIONS, {described.name: described.default for described in fields(DropConfig)}
    )
    parser.add_argument("--version", action="version", version=f"kecho {__version__}")
    return parser


def _config(flags: Mapping[str, Any]) -> DropConfig:
    """Raises OptionError that names the flag."""
    values = {}
    for name, text in flags.items():
        spec = OPTIONS[name]
        try:
            values[name] = spec.check(
                tuple(map(_as_given, text)) if isinstance(text, list) else spec.parse(text)
            )
        except ValueError as error:
            raise OptionError(flag(name), str(error)) from None
    return DropConfig(**values)


def _filter(config: DropConfig, families: set[int]) -> Filter:
    """Of everything but --pid, which is looked up each time."""
    return make_filter(
        states=config.state,
        local=config.local,
        peer=config.peer,
        not_local=config.not_local,
        not_peer=config.not_peer,
        family=families.pop() if len(families) == 1 else None,
        uids=[int(one) for one in config.uid],
        idle_s=config.idle,
    )


def _pairs(words: Sequence[str], has_filter: bool) -> Collection[Pair] | None:
    """Those of the command line, or of standard input; None: the filter says it all."""
    if list(words) == ["-"]:
        return _pairs_of_standard_input()
    if words:
        return _pairs_of_words(words)
    if has_filter or not _may_be_fed_pairs():
        return None
    return _pairs_of_standard_input()


def _pairs_of_words(words: Sequence[str]) -> list[Pair]:
    """A word is an end, a pair, or a line of another tool, which may also be all the words."""
    ends: list[str] = []
    try:
        given = [_as_given(word) for word in words]
        for word in given if ends_of(" ".join(given)) is None else [" ".join(given)]:
            ends += ends_of(word) or [end for end in word.split(" ") if end]
        if len(ends) % 2:
            raise ValueError(f"an odd number of addresses, {len(ends)}: a pair is two")
        return list(
            dict.fromkeys(
                make_pair(parse_endpoint(local), parse_endpoint(peer, peer=True))
                for local, peer in zip(ends[::2], ends[1::2], strict=True)
            )
        )
    except ValueError as error:
        raise PairError(0, str(error)) from None


def _as_given(word: str) -> str:
    """With names of devices as they are known elsewhere: they are bytes, whatever the locale."""
    return as_name(b" ".join(os.fsencode(word).split()))


def _may_be_fed_pairs() -> bool:
    """Standard input is none of those that hold no pairs: closed, a terminal, /dev/null.

    Whether a pipe is one that nobody thought of (cron, ssh) shows only at its end, which may never
    come; until then it would be a guess, and a wrong one drops what was not asked for.
    """
    try:
        return sys.stdin is not None and not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError):  # closed, or no file at all
        return False


def _pairs_of_standard_input() -> PairTable:
    if sys.stdin is None:
        raise OptionError("standard input", "is closed")
    try:
        return PairTable(pairs_in(_lines(sys.stdin.buffer)))
    except OSError as error:
        raise OptionError("standard input", error.strerror or str(error)) from None


def _lines(file: BinaryIO) -> Iterator[str]:
    """One after the other, so that the memory is that of their pairs."""
    left, number = INPUT_BYTES_MOST, 0
    while line := file.readline(LINE_BYTES_MOST + 1):
        number += 1
        left -= len(line)
        if left < 0:
            raise PairError(0, f"standard input has more than {INPUT_BYTES_MOST:,} bytes")
        if len(line) > LINE_BYTES_MOST:
            raise PairError(number, f"more than {LINE_BYTES_MOST:,} bytes")
        yield as_name(line.removesuffix(b"\n"))

"""kecho-drop: drop the given TCP sockets and no others.

Outcomes and lists go to stdout, a summary and errors to stderr. Exit statuses: EPILOG.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from .. import command
from ..errors import OptionError
from ..options import defaults_of, flag, options_of
from .config import FILTERS, DropConfig
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
Drop TCP sockets: those of the pairs, those that match the filters, or, with both, the pairs that
match the filters.

A pair is the local address and the peer's, as ss and netstat print them. Without pairs and
filters, pairs are read from standard input, one a line; lines of ss, netstat -np, lsof -nPi and
/proc/net/tcp are understood. If one line is wrong, nothing is dropped. The name of a process with
a newline in it makes lines of ss -tnp and netstat -tnp wrong; ss -tn avoids it. With filters,
standard input is read for - alone, and must not hold pairs otherwise: use </dev/null."""
EPILOG = """\
END is ADDRESS, PREFIX/LENGTH, PORT, :PORT, :LOW-HIGH, ADDRESS:PORT or [IPV6]:PORT. ADDRESS%eth0
and %eth0 name the device that the socket is bound to; most sockets are bound to none.

Exit status:
  0        all were dropped; with --list or --dry-run, something matches
  1        nothing matched, or some were already gone
  2        wrong usage, or a wrong line
  3        some were not dropped (refused, protected, not tried, too many for --until-empty),
           or output was lost
  4        no permission, or what was asked for is invisible: a process of another user, hidden
           by hidepid, in another network namespace, or without /proc
  5        the kernel lacks CONFIG_INET_DIAG_DESTROY (Linux 4.9), or Linux 6.0 for time-wait
  128 + N  ended by signal N; --watch ends with one of the others

Dropping needs CAP_NET_ADMIN (sudo, setcap cap_net_admin+ep, or capsh --addamb=cap_net_admin).
--netns also needs CAP_SYS_ADMIN. --list needs no privilege. As root, run kecho-drop, or
`python -P -m kecho.drop`: without -P, Python imports modules from the current directory."""


OPTIONS = options_of(DropConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit status."""
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
            raise OptionError(
                "--list", "cannot be combined with --dry-run, --until-empty or --watch"
            )
        if config.dry_run and config.until_empty:
            raise OptionError("--dry-run", "cannot be combined with --until-empty")
        has_filter = bool(config.pid) or wanted.narrows or (config.list and not wanted.is_empty)
        lists_all = config.list and not words and not has_filter and not _may_be_fed_pairs()
        pairs = _pairs(words, has_filter)
        if pairs is None and has_filter and not config.list and _may_be_fed_pairs():
            raise OptionError(
                "standard input",
                "may hold pairs, and there is a filter: add - to drop the pairs that match, or "
                "</dev/null to drop all that matches",
            )
    except OptionError as error:
        return _usage(str(error))
    except PairError as error:
        what = f"standard input, {error}" if error.line else str(error)
        command.say_error(PROGRAM, f"{what}; nothing was dropped")
        return command.EXIT_USAGE
    if pairs is None and not has_filter and not lists_all:
        return _usage("give pairs, or a filter that narrows the choice")
    return work(config, pairs, wanted, ending)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog=PROGRAM,
        usage="kecho-drop [OPTION]... [LOCAL PEER]...\n       kecho-drop [OPTION]... -",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.group("Pairs").add_argument(
        "pairs",
        nargs="*",
        default=[],
        metavar="LOCAL PEER",
        help="Pairs such as 127.0.0.1:36986 127.0.0.1:12345 or [::1]:80 [::1]:9; or -.",
    )
    command.add_options(parser, OPTIONS, defaults_of(DropConfig))
    for number, text in (
        (4, "IPv4 only, also on IPv6 sockets (v4-mapped). Alone only with --list."),
        (6, "IPv6 only. Alone only with --list."),
    ):
        parser.group(FILTERS).add_argument(
            f"-{number}",
            dest=f"v{number}",
            action="store_const",
            const=number,
            default=0,
            help=text,
        )
    parser.end_with_help(version=True)
    return parser


def _config(flags: Mapping[str, Any]) -> DropConfig:
    """Make the configuration from the flags. Raises OptionError that names the flag."""
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
    """Make a filter of all options but --pid, which is looked up each time."""
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
    """Return the pairs of the command line or of standard input. None: there is only a filter."""
    if list(words) == ["-"]:
        return _pairs_of_standard_input()
    if words:
        return _pairs_of_words(words)
    if has_filter or not _may_be_fed_pairs():
        return None
    return _pairs_of_standard_input()


def _pairs_of_words(words: Sequence[str]) -> list[Pair]:
    """Parse words. One word, or all together, are an end, a pair, or a line of another tool."""
    ends: list[str] = []
    try:
        given = [_as_given(word) for word in words]
        for word in given if ends_of(" ".join(given)) is None else [" ".join(given)]:
            ends += ends_of(word) or [end for end in word.split(" ") if end]
        if len(ends) % 2:
            raise ValueError(f"must be pairs of two addresses (got {len(ends)} addresses)")
        return list(
            dict.fromkeys(
                make_pair(parse_endpoint(local), parse_endpoint(peer, peer=True))
                for local, peer in zip(ends[::2], ends[1::2], strict=True)
            )
        )
    except ValueError as error:
        raise PairError(0, str(error)) from None


def _as_given(word: str) -> str:
    """Return a word with the names of devices as the kernel has them: bytes, in any locale."""
    return as_name(b" ".join(os.fsencode(word).split()))


def _may_be_fed_pairs() -> bool:
    """Tell whether standard input may hold pairs: it is not closed, a terminal or /dev/null.

    A pipe that a parent such as cron or ssh left there may never end. To guess that it is empty
    could drop sockets that nobody asked to drop.
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
    """Read lines one by one, so that memory holds only their pairs."""
    left, number = INPUT_BYTES_MOST, 0
    while line := file.readline(LINE_BYTES_MOST + 1):
        number += 1
        left -= len(line)
        if left < 0:
            raise PairError(0, f"standard input has more than {INPUT_BYTES_MOST:,} bytes")
        if len(line) > LINE_BYTES_MOST:
            raise PairError(number, f"more than {LINE_BYTES_MOST:,} bytes")
        yield as_name(line.removesuffix(b"\n"))

"""Save results to the files that were asked for, then print them.

A reader that has gone or a full file system costs no result that can still be saved.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import command
from ..errors import OptionError
from ..options import Option, flag
from .output import report
from .output.files import check_writable, descriptor_of, reason_of, write_whole
from .results.reading import MOST_BYTES
from .results.result import Result, dump
from .results.search import Found
from .subcommands import PROGRAM

__all__ = ["FILES", "OUTPUT", "check_kinds", "check_paths", "deliver", "was_interrupted"]

_BY_SIGNAL = 128
_STDOUT = 1
OUTPUT = "Output"  # a heading of --help


def _file(help: str) -> Option:
    return Option(help, str, str, "FILE", group=OUTPUT)


FILES = {
    "json": _file(
        "Write the result as JSON. As any FILE, - is stdout; the table then goes to stderr."
    ),
    "csv": _file("Write a line for each latency."),
    "hgrm": _file("Write the percentile distribution for HdrHistogram's plotter."),
    "hlog": _file("Write an HdrHistogram log (V2)."),
    "txt": _file("Write each connection's number and mean response time in µs, in mode burst."),
}


def check_kinds(mode: str, options: dict[str, Any]) -> None:
    """Raise OptionError for files that this measurement cannot fill."""
    if options["txt"] and mode != "burst":
        raise OptionError("txt", "is for mode burst only, which has times by connection")
    if options["hgrm"] and mode == "stream":
        raise OptionError("hgrm", "is not for mode stream, which has no response times")
    several = [name for name in ("sweep", "rate_sweep", "find_rate") if options[name] is not None]
    for name in ("hgrm", "txt"):
        if options[name] and several:
            raise OptionError(name, f"is for one result, and {flag(several[0])} has several")
    taken: dict[object, str] = {}
    for name in FILES:
        if options[name]:
            where = descriptor_of(options[name])
            other = taken.setdefault(
                os.path.realpath(options[name]) if where is None else where, name
            )
            if other != name:
                raise OptionError(name, f"goes to the same file as {flag(other)}")


def check_paths(options: dict[str, Any]) -> None:
    """Raise OptionError for a file that cannot be written."""
    for name in FILES:
        try:
            if options[name]:
                check_writable(options[name])
        except (OSError, ValueError) as error:
            raise OptionError(name, f"{options[name]}: {reason_of(error)}") from None


def deliver(
    results: list[Result], found: Found | None, options: dict[str, Any], failure: OSError | None
) -> int:
    """Save and print the results. Return the exit status."""
    is_delivered = not results or _save(results, found, options)
    is_taken = any(descriptor_of(options[name] or "") == _STDOUT for name in FILES)
    text = "\n".join(report.text(result, options["percentiles"]) for result in results)
    if found is not None:
        text += f"\n{found.text()}"
    is_shown = command.show(PROGRAM, text, to_stderr=is_taken)
    # With the file on stdout and a closed stderr, nothing else can be shown.
    is_delivered &= is_shown or (is_taken and sys.stderr is None)
    if failure is not None:
        command.say_error(PROGRAM, failure.strerror or str(failure))
    if any(was_interrupted(result) for result in results):
        return _BY_SIGNAL + signal.SIGINT
    # In a search, rates that are too high are expected to fail.
    failed = found.rate is None if found else any(map(_has_failed, results))
    return command.EXIT_FAILED if failed or not is_delivered else 0


def was_interrupted(result: Result) -> bool:
    """Return whether a signal ended the run, or its last repeat."""
    last = result.repeats[-1] if result.repeats else result
    return bool(last.observed.get("interrupted"))


def _has_failed(result: Result) -> bool:
    """Tell whether a run failed. Lost datagrams are a measurement, unless all are lost. In mode
    idle, no echo is needed."""
    nothing = not result.echoes and result.workload["mode"] != "idle"
    unanswered = result.observed.get("unanswered")
    return bool(result.error_count or result.partial or unanswered or nothing)


def _save(results: Sequence[Result], found: Found | None, options: dict[str, Any]) -> bool:
    """Write every file, whole or not at all. Print failures; return whether there were none."""
    writers: dict[str, Callable[[], str]] = {
        "json": lambda: dump(results, found.to_dict() if found else None) + "\n",
        "csv": lambda: report.to_csv(results, options["percentiles"]),
        "hgrm": lambda: report.to_hgrm(results[-1]),
        "hlog": lambda: report.to_hlog(results),
        "txt": lambda: report.to_txt(results[-1]),
    }
    saved = True
    # Files come first: a write to a descriptor may wait for its reader.
    paths = {name: options[name] for name in FILES if options[name]}
    for name in sorted(paths, key=lambda name: descriptor_of(paths[name]) is not None):
        try:
            content = writers[name]()
            write_whole(paths[name], content)
            if name == "json" and len(content) > MOST_BYTES:
                most = f"the {MOST_BYTES >> 20} MiB that plot, report and compare read"
                command.say(f"{PROGRAM}: warning: --json {paths[name]}: larger than {most}")
        except (OSError, ValueError) as error:
            command.say_error(PROGRAM, f"{flag(name)} {paths[name]}: {reason_of(error)}")
            saved = False
    return saved

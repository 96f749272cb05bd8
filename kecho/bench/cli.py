"""python -m kecho.bench: the benchmark as a command.

The table goes to stdout, all other messages to stderr. Exit status: 0 measured (lost datagrams are
a measurement, unless all are lost); 1 errors, messages without a reply, or nothing was measured;
2 wrong usage; 3 a --fail-if of compare came true; 128 + N ended by signal N (130: Ctrl-C), with the
partial result printed and saved.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from .. import command
from ..errors import OptionError, TuningError
from ..options import Option, defaults_of, flag, integer, options_of, switch
from . import preflight, signals
from .amounts import rate_text
from .delivery import FILES, OUTPUT, check_kinds, check_paths, deliver, was_interrupted
from .output import report
from .output.progress import live_progress
from .place import parse as parse_place
from .preflight import tuning_for
from .results import condition
from .results.result import Result
from .results.search import Found, find_rate, least_rate
from .runner import run
from .spawn import SpawnError, spawned_server
from .subcommands import COMMANDS, PROGRAM
from .target import TargetError
from .tuning.applied import restore_leftover
from .workload import LOAD, MODES, TARGET, Workload

__all__ = ["main"]

_BY_SIGNAL = 128
_RUNS = "Runs"  # a heading of --help
_FIRST_RATE = 1000.0  # that --find-rate begins with
_RUN_DEFAULTS: dict[str, Any] = {"repeat": 1, "tune": False, "percentiles": report.PERCENTILES}
_WORKLOAD_OPTIONS = options_of(Workload)


def _parse_sweep(text: str) -> tuple[int, ...]:
    counts = tuple(_WORKLOAD_OPTIONS["connections"].parse(part) for part in text.split(","))
    for count in counts:
        _WORKLOAD_OPTIONS["connections"].check(count)
    return counts


def _parse_rates(text: str) -> tuple[float, ...]:
    spec = _WORKLOAD_OPTIONS["rate"]
    return tuple(spec.check(spec.parse(part)) for part in text.split(","))


def _parse_limit(text: str) -> condition.Condition:
    limit = condition.parse(text)
    if limit.relative or limit.metric in ("rate", "errors") or ">" in limit.operator:
        raise ValueError(f"must be a limit of a latency, such as p99<1ms (got {text!r})")
    return limit


def _parse_percentiles(text: str) -> tuple[float, ...]:
    names = [one if one.startswith("p") else f"p{one}" for one in text.split(",")]
    for name in names:
        if not condition.is_percentile(name):
            raise ValueError(f"must be percentiles such as 95 or 99.95 (got {name[1:]!r})")
    return tuple(dict.fromkeys(sorted(float(name[1:]) for name in names)))


def _identity(value: Any) -> Any:
    return value


_RUN_OPTIONS = {
    name: replace(spec, group=spec.group or _RUNS)
    for name, spec in {
        "repeat": integer("Number of runs, whose figures are merged.", 1, 10_000),
        "sweep": Option(
            "Run once for each number of connections: 1,10,100,1000.", _parse_sweep, tuple, "N,N"
        ),
        "rate_sweep": Option(
            "Run once at each rate, in mode open: 1000,2000,5000.", _parse_rates, tuple, "N,N"
        ),
        "find_rate": Option(
            "Find the highest rate that keeps a limit such as 'p99<1ms', in runs of --duration.",
            _parse_limit,
            _identity,
            "LIMIT",
        ),
        "spawn": Option(
            "Start a kecho server for the run, with options such as '--dispatch percpu'.",
            str,
            str,
            "OPTIONS",
            value_if_bare="",
        ),
        "tune": switch(
            "Raise the kernel's limits as the run needs them, and put them back afterwards (root)."
        ),
        "server_pid": integer(
            "Process of the server, whose CPU time the verdict looks at.", 1, 1 << 22, "PID"
        ),
        "percentiles": Option(
            "Percentiles in the table and in CSV.", _parse_percentiles, tuple, "N,N", group=OUTPUT
        ),
        **FILES,
    }.items()
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit status."""
    return command.run(PROGRAM, _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    if flags.pop("restore"):
        return _restore()
    try:
        flags |= _place_of(flags)
    except ValueError as error:
        parser.error(str(error))
    try:
        values = {name: _parse(name, text) for name, text in flags.items()}
        extra = {name: values.pop(name, _RUN_DEFAULTS.get(name)) for name in _RUN_OPTIONS}
        if extra["spawn"] is not None and values.keys() & {"host", "port", "uds"}:
            raise OptionError("spawn", "cannot be combined with TARGET, --host, --port or --uds")
        if "uds" in values and (other := values.keys() & {"host", "port"}):
            raise OptionError("uds", f"cannot be combined with {flag(min(other))}")
        workloads = _workloads(values, extra)
        check_kinds(workloads[0].mode, extra)
    except OptionError as error:
        command.say_error(PROGRAM, f"{flag(error.option)}: {error.reason}")
        return command.EXIT_USAGE
    try:
        with signals.heard(signals.ENDINGS, to_the_last=True) as ending:
            try:
                status = _measure(workloads, extra, ending)
            except KeyboardInterrupt:
                status = _BY_SIGNAL + signal.SIGINT
            return _BY_SIGNAL + ending.number if ending.number else status
    except OptionError as error:
        command.say_error(PROGRAM, f"{flag(error.option)}: {error.reason}")
    except (TargetError, SpawnError) as error:
        command.say_error(PROGRAM, str(error))
    return command.EXIT_FAILED


def _parser() -> command.Parser:
    parser = command.Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [TARGET] [OPTION]...\n"
        f"       {PROGRAM} plot RESULT... -o FILE.png\n"
        f"       {PROGRAM} report RESULT... -o FILE.html\n"
        f"       {PROGRAM} compare RESULT RESULT",
        description="Measure an echo server, by default the one at 127.0.0.1:12345.",
        epilog=f"{MODES}\n\nRESULT is a file that --json wrote. plot, report and compare have a "
        "--help of their own.",
    )
    target = parser.group(TARGET)
    for title in (LOAD, _RUNS, OUTPUT):
        parser.group(title)
    target.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="The server: HOST, HOST:PORT, [::1]:PORT, :PORT, unix:PATH or udp://HOST:PORT.",
    )
    command.add_options(parser, _WORKLOAD_OPTIONS, defaults_of(Workload))
    command.add_options(parser, _RUN_OPTIONS, _RUN_DEFAULTS)
    parser.group(_RUNS).add_argument(
        "--restore",
        action="store_true",
        default=False,
        help="Put back what a --tune that was killed has left behind, and exit.",
    )
    parser.end_with_help(version=True)
    return parser


def _place_of(flags: dict[str, Any]) -> dict[str, str]:
    """Take TARGET out of the flags and return the options that it stands for. Raises ValueError if
    it is no place or contradicts a flag."""
    target = flags.pop("target", None)
    if target is None:
        return {}
    place = {name: _word(value) for name, value in parse_place(target).items()}
    contrary = {"host", "port", "uds"} if "uds" in place else {"uds", *place}
    for name in sorted(contrary & flags.keys()):
        if flags[name] != place.get(name):
            raise ValueError(f"{flag(name)} contradicts TARGET {target!r}")
    return place


def _word(value: str | bool) -> str:
    return str(int(value)) if isinstance(value, bool) else value


def _parse(name: str, text: str) -> Any:
    spec = _WORKLOAD_OPTIONS.get(name) or _RUN_OPTIONS[name]
    try:
        return spec.check(spec.parse(text))
    except ValueError as error:
        raise OptionError(name, str(error)) from None


def _workloads(values: dict[str, Any], extra: dict[str, Any]) -> list[Workload]:
    """Return one workload, or one for each step of a sweep."""
    if values.get("udp") and extra["rate_sweep"] is None and extra["find_rate"] is None:
        values.setdefault("mode", "closed")
    sweeps = [name for name in ("sweep", "rate_sweep", "find_rate") if extra[name] is not None]
    if len(sweeps) > 1:
        raise OptionError(sweeps[1], f"cannot be combined with {flag(sweeps[0])}")
    if extra["sweep"] is not None:
        if "connections" in values:
            raise OptionError("sweep", "cannot be combined with --connections")
        return [Workload(**values, connections=count) for count in extra["sweep"]]
    if sweeps and values.setdefault("mode", "open") != "open":
        raise OptionError(sweeps[0], f"is for mode open, not {values['mode']}")
    if extra["rate_sweep"] is not None:
        if "rate" in values:
            raise OptionError("rate_sweep", "cannot be combined with --rate")
        return [Workload(**values, rate=rate) for rate in extra["rate_sweep"]]
    if extra["find_rate"] is not None:
        workload = Workload(**{"rate": _FIRST_RATE, **values})
        limit, least = extra["find_rate"], least_rate(extra["find_rate"], workload.duration)
        if workload.rate is not None and workload.rate < least:
            raise OptionError(
                "find_rate",
                f"{limit.text} needs {rate_text(least)} messages/s or more within "
                f"{workload.duration:g} s: raise --duration or --rate",
            )
        return [workload]
    return [Workload(**values)]


# ---- runs ---------------------------------------------------------------------------------------


def _measure(workloads: list[Workload], extra: dict[str, Any], ending: signals.Ending) -> int:
    largest = max(workloads, key=lambda workload: workload.total_connections)
    results: list[Result] = []
    found: Found | None = None
    failure: OSError | None = None
    status = 0
    server_pid = extra["server_pid"]
    with ExitStack() as stack:
        if extra["tune"]:
            stack.enter_context(_tuned(largest))
        else:
            _restore_quietly()
        check_paths(extra)
        _advise(largest, spawns=extra["spawn"] is not None)
        if extra["spawn"] is not None:
            try:
                server = stack.enter_context(
                    spawned_server(extra["spawn"], largest.total_connections, udp=largest.udp)
                )
            except ValueError as error:
                raise OptionError("spawn", str(error)) from None
            server_pid = server.pid
            workloads = [
                replace(one, uds=server.uds)
                if server.uds
                else replace(one, host=server.host, port=server.port)
                for one in workloads
            ]
        show = stack.enter_context(live_progress())

        def measure(workload: Workload) -> Result:
            """Run all repeats. If one fails or is interrupted, `results` keeps those before it."""
            repeats: list[Result] = []
            try:
                for _ in range(extra["repeat"] or 1):
                    try:
                        repeats.append(run(workload, server_pid=server_pid, on_progress=show))
                    finally:
                        ending.interrupt = None  # the run's
                    if was_interrupted(repeats[-1]):
                        break
                    if ending.number:  # it came when the run had ended by itself
                        raise KeyboardInterrupt
            finally:
                if repeats:
                    results.append(repeats[0] if len(repeats) == 1 else Result.merge(repeats))
            return results[-1]

        try:
            if extra["find_rate"] is not None:
                workload = workloads[0]
                found = find_rate(
                    lambda rate: measure(replace(workload, rate=rate)),
                    extra["find_rate"],
                    workload.rate or _FIRST_RATE,
                    least_rate(extra["find_rate"], workload.duration),
                )
            else:
                for workload in workloads:
                    if was_interrupted(measure(workload)):
                        break
        except KeyboardInterrupt:
            status = _BY_SIGNAL + signal.SIGINT
        except OSError as error:
            failure = error
            status = command.EXIT_FAILED
        # From here on, what has been measured is put away.
        ending.interrupt = lambda: None
    return max(status, deliver(results, found, extra, failure))


def _advise(workload: Workload, *, spawns: bool) -> None:
    """Warn of limits that would spoil the run, with the command that helps."""
    local = spawns or workload.host in ("127.0.0.1", "localhost", "::1")
    for problem in preflight.problems(workload, is_local=local):
        if problem.fatal:
            raise OptionError("connections", str(problem))
        _warn(f"{problem} (or --tune, which puts it back)")


def _warn(text: str) -> None:
    command.say(f"{PROGRAM}: warning: {text}")


def _restore() -> int:
    """Put back what a killed --tune has left behind."""
    restored = restore_leftover()
    text = "".join(f"{one}\n" for one in restored) or "nothing was left behind\n"
    is_shown = command.show(PROGRAM, text)
    failed = any(one.outcome == "failed" for one in restored)
    return command.EXIT_FAILED if failed or not is_shown else 0


def _restore_quietly() -> None:
    try:
        for one in restore_leftover():
            _warn(f"left behind by a run that was killed: {one}")
    except TuningError as error:
        # The state belongs to root: a user who cannot read it cannot put anything back either.
        # Nor can anybody without /proc.
        unseen = (PermissionError, FileNotFoundError)
        if os.geteuid() == 0 and not isinstance(error.__cause__, unseen):
            _warn(str(error))


@contextmanager
def _tuned(workload: Workload) -> Iterator[None]:
    tuned = tuning_for(workload)
    try:
        with tuned:
            for leftover in tuned.leftover:
                _warn(f"left behind by a run that was killed: {leftover}")
            for name, change in tuned.changes.items():
                command.say(f"{PROGRAM}: {name}: {change.old} -> {change.new}")
            yield
    finally:
        for note in tuned.notes:
            _warn(note)
        for one in tuned.restored:
            if one.outcome != "untouched":
                command.say(f"{PROGRAM}: {one}")

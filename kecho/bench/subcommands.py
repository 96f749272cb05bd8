"""Run plot, report and compare, which read results that --json wrote."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace

from .. import command
from .output.files import read_bounded, reason_of, write_whole
from .results import compare, condition
from .results.reading import MOST_BYTES
from .results.result import Result, load

__all__ = ["COMMANDS", "PROGRAM"]

PROGRAM = "kecho.bench"
_EXIT_CONDITION = 3


def _load_all(paths: Sequence[str]) -> list[Result]:
    """Load results and name each after its file. Raises ValueError that names the file."""
    results: list[Result] = []
    names = [os.path.basename(path).removesuffix(".json") for path in paths]
    if len({*names}) < len(names):
        names = list(paths)
    for path, name in zip(paths, names, strict=True):
        try:
            results += [replace(one, name=name) for one in load(read_bounded(path, MOST_BYTES))]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {reason_of(error)}") from None
    return results


def _draw(arguments: Sequence[str], name: str, suffixes: tuple[str, ...], help: str) -> int:
    """Run the subcommand `name`, plot or report. Return the exit status."""
    parser = command.Parser(prog=f"{PROGRAM} {name}", description=help)
    parser.add_argument("results", nargs="+", metavar="RESULT", help="A file that --json wrote.")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help=f"FILE{' or FILE'.join(suffixes)}."
    )
    parser.end_with_help()
    chosen = parser.parse_args(arguments)
    if not chosen.output.endswith(suffixes):
        parser.error(f"--output: must end in {' or '.join(suffixes)} (got {chosen.output!r})")
    try:
        results = _load_all(chosen.results)
        content: str | bytes
        if name == "plot":
            from .output.plot import plot

            buffer = io.BytesIO()
            plot(results, buffer, chosen.output.rpartition(".")[2])
            content = buffer.getvalue()
        else:
            from .output.page import to_html

            content = to_html(results)
        write_whole(chosen.output, content)
    except ImportError:
        command.say_error(PROGRAM, "pictures need matplotlib: pip install 'kecho[plot]'")
        return command.EXIT_FAILED
    except OSError as error:
        command.say_error(PROGRAM, f"--output {chosen.output}: {reason_of(error)}")
        return command.EXIT_FAILED
    except ValueError as error:
        command.say_error(PROGRAM, str(error))
        return command.EXIT_FAILED
    return 0


def _plot(arguments: Sequence[str]) -> int:
    return _draw(
        arguments, "plot", (".png", ".svg"), "Draw results that --json wrote, as PNG or SVG."
    )


def _report(arguments: Sequence[str]) -> int:
    return _draw(
        arguments,
        "report",
        (".html",),
        "Make one self-contained page of results that --json wrote.",
    )


def _compare(arguments: Sequence[str]) -> int:
    parser = command.Parser(
        prog=f"{PROGRAM} compare",
        description="Compare two results that --json wrote: B / A, with bootstrap confidence "
        "intervals over the repeats of each (--repeat).",
        epilog="Exit status 3: a --fail-if condition is true.",
    )
    parser.add_argument("first", metavar="A", help="A file that --json wrote.")
    parser.add_argument("second", metavar="B", help="A file to compare with A.")
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="Condition on B, such as p99>5ms, or on B / A, such as rate<0.95x; repeatable.",
    )
    parser.end_with_help()
    chosen = parser.parse_args(arguments)
    try:
        conditions = [condition.parse(text) for text in chosen.fail_if]
    except ValueError as error:
        parser.error(f"--fail-if: {error}")
    try:
        pair = [_load_all([path]) for path in (chosen.first, chosen.second)]
        for path, results in zip((chosen.first, chosen.second), pair, strict=True):
            if len(results) != 1:
                raise ValueError(f"{path}: a sweep of {len(results)} results, not one")
        (first,), (second,) = pair
        more = [one.metric for one in conditions if condition.is_percentile(one.metric)]
        text = compare.text(first, second, more)
        failed, unknown = compare.failed_conditions(conditions, first, second)
    except ValueError as error:
        command.say_error(PROGRAM, str(error))
        return command.EXIT_FAILED
    is_shown = command.show(PROGRAM, text)
    for one in failed:
        command.say(f"{PROGRAM}: failed: {one.text}")
    for reason in unknown:
        command.say_error(PROGRAM, reason)
    if failed:
        return _EXIT_CONDITION
    return 0 if is_shown and not unknown else command.EXIT_FAILED


COMMANDS = {"plot": _plot, "report": _report, "compare": _compare}

"""What the commands share: a parser made from options, exit statuses, output that may fail."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from ._version import __version__
from .journal import ERROR, is_journal, with_priority
from .null import open_null
from .options import Option, flag
from .printable import one_line, printable

__all__ = [
    "EXIT_FAILED",
    "EXIT_USAGE",
    "Parser",
    "add_options",
    "discard",
    "help_text",
    "one_line",
    "plural",
    "put",
    "run",
    "say",
    "say_error",
    "show",
]

EXIT_FAILED = 1
EXIT_USAGE = 2


def run(
    program: str,
    main: Callable[[Sequence[str]], int],
    arguments: Sequence[str] | None,
) -> int:
    """Run the body of a command on `arguments` or sys.argv. Return its exit status."""
    # Signals that the parent blocked stay blocked after exec: signal(7). They could not end it.
    with suppress(OSError):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    devnull_fd = _occupy_standard_descriptors()
    _have_streams_write_all()
    _escape_what_cannot_be_encoded()
    try:
        status = main(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # what is still buffered fails here
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # the reader of stdout has gone, or the disk is full
        if error.errno != errno.EPIPE:
            say_error(program, str(error))
        return EXIT_FAILED
    except Exception:  # a defect; Python would print it without our escapes
        import traceback

        show(program, traceback.format_exc(), to_stderr=True)
        return EXIT_FAILED
    finally:
        _flush_streams(devnull_fd)
        os.close(devnull_fd)


def _have_streams_write_all() -> None:
    """Put a buffer under raw streams, as with PYTHONUNBUFFERED.

    A signal makes write(2) return early. io.TextIOWrapper on a raw file ignores that and drops the
    rest; a buffer writes it.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if (
            stream is getattr(sys, f"__{name}__")  # not a replacement, such as a test's
            and isinstance(stream, io.TextIOWrapper)
            and isinstance(stream.buffer, io.RawIOBase)
        ):
            whole = open(  # noqa: SIM115
                stream.fileno(), "w", 1, stream.encoding, stream.errors, closefd=False
            )
            setattr(sys, name, whole)


def _escape_what_cannot_be_encoded() -> None:
    """Print names that the kernel or a user chose in any locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_streams(devnull_fd: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(devnull_fd, stream.fileno())


def discard(stream: TextIO) -> None:
    """Discard output that cannot be written. Otherwise Python fails at exit, when it flushes."""
    devnull_fd = open_null()
    try:
        os.dup2(devnull_fd, stream.fileno())
    finally:
        os.close(devnull_fd)


def _occupy_standard_descriptors() -> int:
    """Open 0, 1 and 2 if they are closed. Return one more descriptor of /dev/null.

    Otherwise the next socket would get the number 2, and a client would receive what is written to
    stderr. The extra descriptor is for the end: a sandbox forbids to open it then.
    """
    while (fd := open_null()) <= 2:
        pass
    return fd


def say_error(program: str, text: str) -> None:
    line = f"{program}: error: {text}"
    say(with_priority(line, ERROR) if is_journal(2) else line)


def say(text: str) -> None:
    """Print a line on stderr. Ignore failures: the exit status is all that is left."""
    with suppress(OSError):
        _write(f"{one_line(text)}\n", sys.stderr)


def put(text: str, end: str = "\n") -> None:
    """Print text and a newline on stdout. Like print(), do not flush."""
    print(printable(text), end=end)


def show(program: str, text: str, *, to_stderr: bool = False) -> bool:
    """Write text to stdout or stderr. Return whether that succeeded; raise nothing.

    On failure, `program` prints the reason on stderr, unless the reader has closed its pipe. A
    closed stream fails; text for stderr never goes to stdout.
    """
    stream: TextIO | None = sys.stderr if to_stderr else sys.stdout
    if stream is None:
        return False
    try:
        _write(text, stream)
    except OSError as error:
        with suppress(OSError, ValueError):
            discard(stream)
        if error.errno != errno.EPIPE:
            say_error(program, f"{_name(stream)}: {error.strerror or error}")
        return False
    return True


def _name(stream: TextIO) -> str:
    return "standard error" if stream is sys.stderr else "standard output"


_PLAIN = str.maketrans({"µ": "u", "…": "..."})  # replaced where the locale lacks them


def _write(text: str, stream: TextIO | None) -> None:
    """Write text and flush. Raises OSError. None is a stream that accepts nothing."""
    if stream is None:  # closed when the process started; print() would use stdout
        return
    try:
        try:
            stream.write(printable(text))
        except UnicodeEncodeError:
            plain = printable(text).translate(_PLAIN).encode(stream.encoding, "backslashreplace")
            stream.write(plain.decode(stream.encoding))
        stream.flush()
    except ValueError as error:  # the stream is closed
        raise OSError(errno.EBADF, str(error)) from None


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


class _Formatter(argparse.HelpFormatter):
    """Breaks no line within a flag, as argparse would behind a hyphen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill paragraphs. Keep a table, whose rows are indented, as it is."""
        return "\n\n".join(
            one if "\n  " in one else textwrap.fill(one, width, break_on_hyphens=False)
            for one in text.split("\n\n")
        )


class Parser(argparse.ArgumentParser):
    """A parser that lists its options in groups, in the order in which they were added.

    Flags that are not given are not in the namespace. Flags cannot be abbreviated.
    """

    def __init__(
        self, prog: str, description: str, epilog: str | None = None, usage: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=_Formatter,
        )
        self._groups: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group with this title; if there is none, add it at the end."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def end_with_help(self, *, version: bool = False) -> None:
        """Add the last group: ``--help`` and, if asked, ``--version``."""
        group = self.group("Other")
        if version:
            group.add_argument(
                "--version",
                action="version",
                version=f"kecho {__version__}",
                help="Print the version and exit.",
            )
        group.add_argument("-h", "--help", action="help", help="Print this help and exit.")

    def error(self, message: str) -> NoReturn:
        """Print one line that names ``--help``; argparse would print the whole usage."""
        say_error(self.prog, f"{message} (--help lists the options)")
        sys.exit(EXIT_USAGE)


class _Switch(argparse.Action):
    """A flag without a value; ``--no-...`` switches it off."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, "0" if (option_string or "").startswith("--no-") else "1")


def add_options(
    parser: Parser, options: Mapping[str, Option], defaults: Mapping[str, object]
) -> None:
    """Add a flag for each option to its group.

    In the namespace, the value of an option is its text; a list of texts if it is repeatable.
    """
    for name, spec in options.items():
        default = defaults.get(name)
        group = parser.group(spec.group)
        flags = [f"-{spec.letter}"] if spec.letter else []
        flags.append(flag(name))
        text = help_text(spec, default).replace("%", "%%")
        if spec.metavar is None:
            off = flag("no_" + name)
            if default is False:  # --no-... exists, but nobody needs it in the help
                group.add_argument(off, dest=name, action=_Switch, help=argparse.SUPPRESS)
            else:
                flags.append(off)
            group.add_argument(*flags, dest=name, action=_Switch, help=text)
        elif spec.repeatable:
            group.add_argument(*flags, dest=name, action="append", metavar=spec.metavar, help=text)
        elif spec.value_if_bare is not None:
            group.add_argument(
                *flags,
                dest=name,
                nargs="?",
                const=spec.value_if_bare,
                metavar=spec.metavar,
                help=text,
            )
        else:
            group.add_argument(*flags, dest=name, metavar=spec.metavar, help=text)


def help_text(spec: Option, default: object) -> str:
    """Return what ``--help`` says of an option: its text and its default."""
    if default is None or isinstance(default, bool) or default == ():
        return spec.help
    values = default if isinstance(default, tuple) else (default,)
    shown = (format(one, "g") if isinstance(one, float) else str(one) for one in values)
    return f"{spec.help} [default {', '.join(shown)}]"

"""Define what an option is: its default, help, parser and check, in one place.

The configurations of the server, the benchmark and the dropper are dataclasses whose fields each
carry an Option; their command lines and keyword arguments derive from it.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar, dataclass_transform

from .errors import OptionError

__all__ = [
    "Option",
    "check_fields",
    "check_uds_path",
    "choice",
    "configuration",
    "defaults_of",
    "describe_options",
    "describe_size",
    "flag",
    "integer",
    "is_abstract",
    "option",
    "option_of",
    "options_of",
    "seconds",
    "size",
    "switch",
    "uds_address",
]

UDS_PATH_BYTES = 107  # sizeof sockaddr_un.sun_path, less the closing NUL: unix(7)
LONGEST_TIMEOUT_S = 2_000_000  # 23 days: milliseconds in 31 bits

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One option.

    help: short sentences for ``--help``: at most a line and a half at 100 columns.
    parse: turns text into a value; raises ValueError with a reason that follows the option's name.
    check: returns the value in its final form; raises ValueError the same way.
    metavar: how ``--help`` names the value; None for a switch, which takes none.
    value_if_bare: the text that the flag means when it is given without a value.
    repeatable: the flag may be repeated; in an environment variable, commas separate the values.
    letter: a short form of the flag.
    group: the heading in ``--help``.
    between: the lowest and the highest number.
    choices: the words to choose from.
    """

    help: str
    parse: Callable[[str], Any]
    check: Callable[[Any], Any]
    metavar: str | None
    value_if_bare: str | None = None
    repeatable: bool = False
    letter: str | None = None
    group: str = ""
    between: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()


def option(spec: Option, group: str, *, default: T) -> T:
    """Define a field of a configuration. It carries its Option."""
    return field(default=default, metadata={"option": replace(spec, group=group)})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def configuration(config_class: type[T]) -> type[T]:
    """Make a frozen dataclass of options. Type checkers and editors see each option's default."""
    return dataclass(frozen=True, kw_only=True)(config_class)


def option_of(described: Field[Any]) -> Option:
    """Return the Option that a field carries."""
    spec: Option = described.metadata["option"]
    return spec


def options_of(config_class: type[Any]) -> dict[str, Option]:
    """Return the Option of every field of a configuration, by name."""
    return {described.name: option_of(described) for described in fields(config_class)}


def defaults_of(config_class: type[Any]) -> dict[str, Any]:
    """Return the default of every field of a configuration, by name."""
    return {described.name: described.default for described in fields(config_class)}


def describe_options(config_class: type[Any], indent: int = 0) -> str:
    """Return the options of a configuration as a manual page lists them: name, type, default and
    meaning, under the headings of ``--help``."""
    lines: list[str] = []
    group = ""
    for described in fields(config_class):
        spec = option_of(described)
        if spec.group != group:
            group = spec.group
            lines += ["", f"-- {group} --", ""]
        kind = " | ".join(map(repr, spec.choices)) or described.type
        lines += [f"{described.name}: {kind} = {described.default!r}"]
        lines += textwrap.wrap(spec.help, 88, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return textwrap.indent("\n".join(lines[1:]), " " * indent)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- kinds of values ------------------------------------------------------------------------


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_integer(text: str) -> int:
    # int() also takes "1_000", " 5" and other alphabets' digits, which are more likely slips.
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"must be a whole number (got {text!r})")
    if len(digits) > 20:
        raise ValueError(f"must have at most 20 digits (got {len(digits)})")
    return int(text)


def integer(
    help: str,
    low: int,
    high: int,
    metavar: str = "N",
    *,
    optional: bool = False,
    letter: str | None = None,
) -> Option:
    def check(value: object) -> object:
        if value is None and optional:
            return None
        if not _is_integer(value):
            raise ValueError(f"must be a whole number (got {value!r})")
        if not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"must be between {low} and {high} (got {value})")
        return value

    return Option(help, _parse_integer, check, metavar, letter=letter, between=(low, high))


def _parse_seconds(text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"must be a number of seconds (got {text!r})") from None


def seconds(
    help: str, *, optional: bool = False, zero: bool = False, letter: str | None = None
) -> Option:
    lowest_s = 0.0 if zero else 0.001

    def check(value: object) -> float | None:
        if value is None and optional:
            return None
        if not (_is_integer(value) or isinstance(value, float)):
            raise ValueError(f"must be a number of seconds (got {value!r})")
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and lowest_s <= number <= LONGEST_TIMEOUT_S):
            raise ValueError(
                f"must be between {lowest_s:g} and {LONGEST_TIMEOUT_S} seconds (got {value})"
            )
        return number

    limits = (lowest_s, LONGEST_TIMEOUT_S)
    return Option(help, _parse_seconds, check, "SECONDS", letter=letter, between=limits)


_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _parse_size(text: str) -> int:
    digits = text.rstrip("KMG")
    unit = text[len(digits) :]
    if unit not in _SIZE_UNITS:
        raise ValueError(f"must be a number of bytes, such as 65536, 64K or 1G (got {text!r})")
    return _parse_integer(digits) * _SIZE_UNITS[unit]


def size(help: str, low: int, high: int, *, optional: bool = False) -> Option:
    """Define an option of bytes. In text, K, M and G stand for 1024 bytes, 1024 K, 1024 M."""
    return replace(integer(help, low, high, "BYTES", optional=optional), parse=_parse_size)


def describe_size(count: int) -> str:
    """Return a number of bytes as an option takes it: 12M."""
    unit = max(
        (unit for unit, size in _SIZE_UNITS.items() if count % size == 0),
        key=_SIZE_UNITS.__getitem__,
    )
    return f"{count // _SIZE_UNITS[unit]}{unit}"


def choice(help: str, *choices: str) -> Option:
    def check(value: object) -> object:
        if value not in choices:
            raise ValueError(f"must be one of: {', '.join(choices)} (got {value!r})")
        return value

    return Option(help, str, check, "|".join(choices), choices=choices)


_SWITCH_WORDS = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def _parse_switch(text: str) -> bool:
    try:
        return _SWITCH_WORDS[text.lower()]
    except KeyError:
        raise ValueError(f"must be one of: {', '.join(_SWITCH_WORDS)} (got {text!r})") from None


def switch(help: str, *, optional: bool = False) -> Option:
    def check(value: object) -> bool | None:
        if value is None and optional:
            return None
        if not isinstance(value, bool):
            raise ValueError(f"must be True or False (got {value!r})")
        return value

    return Option(help, _parse_switch, check, None, value_if_bare="1")


def check_uds_path(value: object) -> str | None:
    """Return the path of a Unix socket as text. Raises ValueError."""
    if value is None:
        return None
    try:
        path = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"must be a path (got {value!r})") from None
    size = len(os.fsencode(path))
    if not path or "\0" in path:
        raise ValueError(f"must be a path (got {path!r})")
    if size > UDS_PATH_BYTES:
        raise ValueError(
            f"must have at most {UDS_PATH_BYTES} bytes, the kernel's limit (got {size})"
        )
    return path


def is_abstract(uds: str) -> bool:
    """Tell whether a path names an abstract socket, which has no file: unix(7)."""
    return uds.startswith("@")


def uds_address(uds: str) -> bytes:
    """Return what bind(2) and connect(2) take: a path, or a zero byte and a name."""
    path = os.fsencode(uds)
    return b"\0" + path[1:] if is_abstract(uds) else path


def check_fields(config: object) -> None:
    """Check every field of a frozen dataclass and store its final form. Raises OptionError."""
    for described in fields(config):  # type: ignore[arg-type]
        try:
            value = option_of(described).check(getattr(config, described.name))
        except ValueError as error:
            raise OptionError(described.name, str(error)) from None
        object.__setattr__(config, described.name, value)

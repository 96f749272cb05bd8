"""What an option is: its default, help, text to value, and check, in one place.

The configurations of the server, the benchmark and the dropper are dataclasses whose fields each
carry an Option; their command lines and keyword arguments derive from it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from .errors import OptionError

__all__ = [
    "Option",
    "check_fields",
    "check_uds_path",
    "choice",
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

    help: one sentence for ``--help``.
    parse: text to value; raises ValueError with a reason that follows the option's name.
    check: returns the value in its final form; raises ValueError the same way.
    metavar: how ``--help`` names the value; None for a switch, which takes none.
    value_if_bare: the text that the flag alone, without a value, stands for.
    repeatable: the flag may be given again; in the environment, values are parted by commas.
    letter: a short form of the flag.
    """

    help: str
    parse: Callable[[str], Any]
    check: Callable[[Any], Any]
    metavar: str | None
    value_if_bare: str | None = None
    repeatable: bool = False
    letter: str | None = None


def option(default: T, spec: Option) -> T:
    """A dataclass field that carries its Option."""
    return field(default=default, metadata={"option": spec})


def option_of(described: Field[Any]) -> Option:
    spec: Option = described.metadata["option"]
    return spec


def options_of(config_class: type[Any]) -> dict[str, Option]:
    """Name -> Option of every field of a configuration."""
    return {described.name: option_of(described) for described in fields(config_class)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- kinds of values ------------------------------------------------------------------------


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_integer(text: str) -> int:
    # int() also takes "1_000", " 5" and other alphabets' digits, which are more likely slips.
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"{text!r} is not a whole number")
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits is out of range")
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
            raise ValueError(f"{value!r} is not a whole number")
        if not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"{value} is not between {low} and {high}")
        return value

    return Option(help, _parse_integer, check, metavar, letter=letter)


def _parse_seconds(text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds") from None


def seconds(
    help: str, *, optional: bool = False, zero: bool = False, letter: str | None = None
) -> Option:
    def check(value: object) -> float | None:
        if value is None and optional:
            return None
        if not (_is_integer(value) or isinstance(value, float)):
            raise ValueError(f"{value!r} is not a number of seconds")
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        lowest_s = 0.0 if zero else 0.001
        if not (math.isfinite(number) and lowest_s <= number <= LONGEST_TIMEOUT_S):
            raise ValueError(f"{value} is not between {lowest_s:g} and {LONGEST_TIMEOUT_S} seconds")
        return number

    return Option(help, _parse_seconds, check, "SECONDS", letter=letter)


_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _parse_size(text: str) -> int:
    digits = text.rstrip("KMG")
    unit = text[len(digits) :]
    if unit not in _SIZE_UNITS:
        raise ValueError(f"{text!r} is not a number of bytes; K, M and G are 1024 of each other")
    return _parse_integer(digits) * _SIZE_UNITS[unit]


def size(help: str, low: int, high: int, *, optional: bool = False) -> Option:
    """Bytes."""
    return replace(integer(help, low, high, "BYTES", optional=optional), parse=_parse_size)


def describe_size(count: int) -> str:
    """As an option of bytes takes it: 12M."""
    unit = max(
        (unit for unit, size in _SIZE_UNITS.items() if count % size == 0),
        key=_SIZE_UNITS.__getitem__,
    )
    return f"{count // _SIZE_UNITS[unit]}{unit}"


def choice(help: str, *choices: str) -> Option:
    def check(value: object) -> object:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return value

    return Option(help, str, check, "|".join(choices))


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
        raise ValueError(f"{text!r} is none of {', '.join(_SWITCH_WORDS)}") from None


def switch(help: str, *, optional: bool = False) -> Option:
    def check(value: object) -> bool | None:
        if value is None and optional:
            return None
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither True nor False")
        return value

    return Option(help, _parse_switch, check, None, value_if_bare="1")


def check_uds_path(value: object) -> str | None:
    if value is None:
        return None
    try:
        path = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{value!r} is not a path") from None
    size = len(os.fsencode(path))
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a path")
    if size > UDS_PATH_BYTES:
        raise ValueError(f"a path of {size} bytes; the kernel takes at most {UDS_PATH_BYTES}")
    return path


def is_abstract(uds: str) -> bool:
    """Whether it names a socket that has no file: unix(7)."""
    return uds.startswith("@")


def uds_address(uds: str) -> bytes:
    """What bind(2) and connect(2) take for it: a path, or a zero byte and a name."""
    path = os.fsencode(uds)
    return b"\0" + path[1:] if is_abstract(uds) else path


def check_fields(config: object) -> None:
    """Has every field of a frozen dataclass checked, in its final form. Raises OptionError."""
    for described in fields(config):  # type: ignore[arg-type]
        try:
            value = option_of(described).check(getattr(config, described.name))
        except ValueError as error:
            raise OptionError(described.name, str(error)) from None
        object.__setattr__(config, described.name, value)

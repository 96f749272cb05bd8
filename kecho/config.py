"""The options of the server: each one is defined here, once.

A field of ServerConfig carries its default, its help text, how text (of a flag or an environment
variable) becomes a value, and what makes a value valid. The command line, the environment and
the keyword arguments of kecho.Server all derive from it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from .errors import OptionError

__all__ = ["Option", "ServerConfig", "check_options", "check_timeout", "option_of", "options_of"]

ENVIRONMENT_PREFIX = "KECHO_"
UDS_PATH_BYTES = 107  # sizeof sockaddr_un.sun_path, less the closing NUL: unix(7)
LONGEST_TIMEOUT_S = 2_000_000  # 23 days: milliseconds in 31 bits
MOST_THREADS = 1024

Dispatch = Literal["shared", "percpu"]
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
    """

    help: str
    parse: Callable[[str], Any]
    check: Callable[[Any], Any]
    metavar: str | None
    value_if_bare: str | None = None
    repeatable: bool = False


def option(default: T, spec: Option) -> T:
    """A dataclass field that carries its Option."""
    return field(default=default, metadata={"option": spec})


def option_of(described: Field[Any]) -> Option:
    spec: Option = described.metadata["option"]
    return spec


def options_of(config_class: type[Any]) -> dict[str, Option]:
    """Name -> Option of every option of ServerConfig, or of a class that extends it."""
    return {described.name: option_of(described) for described in fields(config_class)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def environment_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


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
    help: str, low: int, high: int, metavar: str = "N", *, optional: bool = False
) -> Option:
    def check(value: object) -> object:
        if value is None and optional:
            return None
        if not _is_integer(value):
            raise ValueError(f"{value!r} is not a whole number")
        if not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"{value} is not between {low} and {high}")
        return value

    return Option(help, _parse_integer, check, metavar)


def _parse_seconds(text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds") from None


def seconds(help: str, *, optional: bool = False, zero: bool = False) -> Option:
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

    return Option(help, _parse_seconds, check, "SECONDS")


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


def _check_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither True nor False")
    return value


def switch(help: str) -> Option:
    return Option(help, _parse_switch, _check_switch, None, value_if_bare="1")


def _parse_hosts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _check_hosts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{value!r} is neither an address nor several")
    hosts = tuple(value)
    for host in hosts:
        if not isinstance(host, str) or not host or "\0" in host:
            raise ValueError(f"{host!r} is not an address or a name")
    return hosts


def _check_path(value: object) -> str | None:
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


# ---- the options ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The options of a server, checked. Raises OptionError, which is a ValueError.

    The text below is made from the options themselves.
    """

    host: tuple[str, ...] = option(
        ("127.0.0.1",),
        Option(
            "address or name to listen on, IPv4 or IPv6; may be given again; 0.0.0.0 or :: is "
            "reachable from other hosts",
            _parse_hosts,
            _check_hosts,
            "ADDRESS",
            repeatable=True,
        ),
    )
    port: int = option(12345, integer("TCP port; 0 takes a free one and prints it", 0, 65535))
    uds: str | None = option(
        None,
        Option(
            "Unix stream socket to listen on: instead of TCP, or beside it when --host or "
            "--port is given, too",
            str,
            _check_path,
            "PATH",
        ),
    )
    backlog: int = option(
        128,
        integer(
            "connections that may wait to be accepted, on each listener; the kernel truncates "
            "it to net.core.somaxconn",
            0,
            2**31 - 1,
        ),
    )
    dispatch: Dispatch = option(
        "shared",
        choice(
            "shared: one work queue, any thread serves any connection; percpu: one pinned "
            "thread per CPU, which keeps the connections whose packets arrive there",
            "shared",
            "percpu",
        ),
    )
    threads: int | None = option(
        None,
        integer(
            "worker threads; by default as many as there are usable CPUs (affinity, cgroup quota)",
            1,
            MOST_THREADS,
            optional=True,
        ),
    )
    reuse_port: bool = option(
        False, switch("let other server processes listen on the same port (SO_REUSEPORT)")
    )
    max_connections: int | None = option(
        None,
        integer(
            "open connections at most; further clients wait in the accept queue",
            1,
            2**32 - 2,
            optional=True,
        ),
    )
    idle_timeout: float | None = option(
        None,
        seconds("close a connection on which no byte has moved for so many seconds", optional=True),
    )
    graceful_timeout: float = option(
        5.0,
        seconds(
            "when stopping, for how many seconds to go on echoing what was received", zero=True
        ),
    )

    def __post_init__(self) -> None:
        for described in fields(self):
            try:
                value = option_of(described).check(getattr(self, described.name))
            except ValueError as error:
                raise OptionError(described.name, str(error)) from None
            object.__setattr__(self, described.name, value)
        if not self.host and self.uds is None:
            raise OptionError("host", "there is neither an address nor a Unix socket to listen on")

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> ServerConfig:
        """From the options that somebody gave: the keyword arguments of kecho.Server.

        Beyond the fields it takes ``bench`` (0 is shared, 1 is percpu), and leaves TCP out when
        ``uds`` is given and neither ``host`` nor ``port``. Raises OptionError, and TypeError for
        an option that does not exist.
        """
        return cls(**check_options(cls, options))


def describe_options() -> str:
    """A line for each option of ServerConfig: name, type, default, what it means."""
    return "\n".join(
        f"    {described.name}: {described.type} = {described.default!r}\n"
        f"        {option_of(described).help}."
        for described in fields(ServerConfig)
    )


ServerConfig.__doc__ = f"{ServerConfig.__doc__}\n{describe_options()}\n"

BENCH = replace(
    integer("1: percpu, 0: shared; the same as --dispatch, in one figure", 0, 1, metavar="0|1"),
    value_if_bare="1",
)
_DISPATCH_OF_BENCH = ("shared", "percpu")


def check_options(
    config_class: type[ServerConfig], options: Mapping[str, object]
) -> dict[str, Any]:
    """The fields of `config_class` that `options` stand for: see ServerConfig.from_options()."""
    given = dict(options)
    unknown = given.keys() - options_of(config_class).keys() - {"bench"}
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    if "bench" in given:
        try:
            dispatch = _DISPATCH_OF_BENCH[BENCH.check(given.pop("bench"))]
        except ValueError as error:
            raise OptionError("bench", str(error)) from None
        if given.setdefault("dispatch", dispatch) != dispatch:
            raise OptionError("bench", f"means dispatch {dispatch}, not {given['dispatch']}")
    if given.get("uds") is not None and not given.keys() & {"host", "port"}:
        given["host"] = ()
    return given


def check_timeout(name: str, value: object) -> float:
    """A number of seconds that a method takes, checked as the option of that name is."""
    try:
        checked: float = options_of(ServerConfig)[name].check(value)
    except ValueError as error:
        raise OptionError(name, str(error)) from None
    return checked

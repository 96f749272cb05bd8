"""Define the options that only the command has, and find the value of every option.

A flag wins over the environment, the environment over the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from .. import command
from ..errors import OptionError
from ..options import Option, choice, configuration, flag, option, options_of, seconds, switch
from ..printable import json_text, one_line
from . import values
from .arguments import BENCH
from .config import SECURITY, ServerConfig, environment_variable
from .public import PUBLIC
from .systemd import take_listen_fds

__all__ = [
    "OPTIONS",
    "CommandConfig",
    "gather",
    "gather_listen_fds",
    "is_url",
    "print_config",
]

LOGGING = "Logging"


@configuration
class CommandConfig(ServerConfig):
    """The server's options, and those of the process that runs it."""

    user: str | None = option(
        Option(
            "User to become once the sockets are open. Without GROUP, with all groups of the user.",
            str,
            values.check_user,
            "NAME[:GROUP]",
        ),
        SECURITY,
        default=None,
    )
    sandbox: bool | None = option(
        switch(
            "Forbid all but serving (seccomp, Landlock). Default: where possible. "
            "--sandbox: fail otherwise.",
            optional=True,
        ),
        SECURITY,
        default=None,
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        choice(
            "The least severe messages to print on stderr.", "debug", "info", "warning", "error"
        ),
        LOGGING,
        default="info",
    )
    log_format: Literal["text", "json"] = option(
        choice("text: plain lines. json: one JSON object a line.", "text", "json"),
        LOGGING,
        default="text",
    )
    stats_interval: float | None = option(
        seconds(
            "Print a line of counters this often. SIGUSR1 prints one at any time.", optional=True
        ),
        LOGGING,
        default=None,
    )


OPTIONS: dict[str, Option] = {**options_of(CommandConfig), "bench": BENCH}


def gather(
    flags: Mapping[str, Any], environment: Mapping[str, str], sources: dict[str, str]
) -> dict[str, object]:
    """Return the values of the options that were given. Put the flag or variable of each into
    `sources`.

    A variable that is empty or holds a URL counts as not set. Raises OptionError that names the
    source.
    """
    texts = dict(flags)
    for name in OPTIONS.keys() - flags.keys():
        variable = environment_variable(name)
        if not environment.get(variable) or is_url(environment[variable]):
            continue
        if flags.keys().isdisjoint(_SAME_OPTION.get(name, ())):
            texts[name] = environment[variable]
    values: dict[str, object] = {}
    for name in OPTIONS.keys() & texts.keys():
        sources[name] = flag(name) if name in flags else environment_variable(name)
        spec, text = OPTIONS[name], texts[name]
        try:
            # Each --host is one address; in a variable, commas separate several.
            values[name] = spec.check(tuple(text) if isinstance(text, list) else spec.parse(text))
        except ValueError as error:
            raise OptionError(sources[name], str(error)) from None
    return values


def is_url(text: str) -> bool:
    """Tell whether a variable holds a URL such as tcp://10.0.0.7:12345. No option takes one.

    For a Service called kecho, Kubernetes puts one into KECHO_PORT of every container; Docker does
    so for a link.
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def gather_listen_fds(values: dict[str, object], sources: dict[str, str]) -> None:
    """Take the sockets that a service manager hands over, as if KECHO_FD named them."""
    try:
        fds = take_listen_fds(os.environ)
    except ValueError as error:
        raise OptionError("LISTEN_FDS", str(error)) from None
    if fds and "fd" not in values:
        values["fd"], sources["fd"] = fds, "LISTEN_FDS"


# A flag for one also wins over a variable for the other.
_SAME_OPTION = {"bench": ("dispatch",), "dispatch": ("bench",)}


def print_config(config: CommandConfig, sources: Mapping[str, str]) -> None:
    """Print every option, its value and where that comes from."""
    origin = dict(sources)
    if "bench" in origin:
        origin.setdefault("dispatch", origin["bench"])
    for name in PUBLIC if config.public else ():
        origin.setdefault(name, origin["public"])
    values = {described.name: getattr(config, described.name) for described in fields(config)}
    if config.log_format == "json":
        rows = {
            name: {"value": value, "source": origin.get(name, "default")}
            for name, value in values.items()
        }
        command.put(json_text(rows, indent=2))
        return
    for name, value in values.items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if name == "uds_mode" and value is not None:
            shown = f"{value:03o}"
        if shown is None or shown == "":
            shown = "-"
        elif isinstance(shown, bool):
            shown = "on" if shown else "off"
        shown = one_line(str(shown))
        command.put(f"{name.replace('_', '-'):17} {shown:24} {origin.get(name, 'default')}")

"""python -m kecho: the server as a command.

Flags, environment variables and defaults come from the options of CommandConfig; a flag wins over
the environment, the environment over the default. Everything is said on stderr.

Exit status: 0 after a stop by SIGINT, SIGTERM or SIGHUP, 1 when the system refuses something or
closes a listener, 2 for wrong usage.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .. import command
from .._version import __version__
from ..command import plural
from ..errors import EngineError, ListenerLostError, ListenError, OptionError
from ..journal import is_journal, with_priority
from ..options import Option, choice, describe_size, flag, option, options_of, seconds, switch
from ..printable import json_text, one_line
from ..system import sysctl
from . import foreground
from .config import BENCH, ServerConfig, check_options, environment_variable
from .confinement import privileges
from .confinement.confine import confine
from .logs import stderr_handler
from .public import PUBLIC, describe_limits
from .server import Server
from .sockets.addresses import describe_addresses
from .stats import Stats, UdpCounters
from .systemd import Notifier, take_listen_fds

__all__ = ["CommandConfig", "main"]

log = logging.getLogger("kecho")


def _check_user(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{value!r} is not a user")
    return value


@dataclass(frozen=True, kw_only=True)
class CommandConfig(ServerConfig):
    """The server's options, and those that only the command has, since they are a process's."""

    user: str | None = option(
        None,
        Option(
            "who to become once the sockets are open, by name or number; without a group, with "
            "the user's own",
            str,
            _check_user,
            "NAME[:GROUP]",
        ),
    )
    sandbox: bool | None = option(
        None,
        switch(
            "give up files, programs, outgoing connections and all else that serving does not "
            "need (seccomp, Landlock); by default as far as the kernel can; an error if it "
            "cannot; --no-sandbox leaves it",
            optional=True,
        ),
    )
    stats_interval: float | None = option(
        None,
        seconds("print a line of counters so often; SIGUSR1 prints one at any time", optional=True),
    )
    log_level: str = option(
        "info", choice("how much to say on stderr", "debug", "info", "warning", "error")
    )
    log_format: str = option(
        "text", choice("lines for a person, or a JSON object each", "text", "json")
    )


_DESCRIPTORS_TO_COME = 8  # beside the clients', once it listens

OPTIONS: dict[str, Option] = {"bench": BENCH, **options_of(CommandConfig)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.run("kecho", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    flags = vars(_parser().parse_args(arguments))
    print_config = flags.pop("print_config")
    sources: dict[str, str] = {}
    try:
        values = _gather(flags, os.environ, sources)
        if not print_config:
            _gather_listen_fds(values, sources)
        config = CommandConfig(**check_options(CommandConfig, values))
        identity = privileges.find_identity(config.user) if config.user is not None else None
    except OptionError as error:
        source = sources.get(error.option, error.option)
        command.say_error("kecho", f"{source}: {error.reason}")
        return command.EXIT_USAGE
    if print_config:
        _print_config(config, sources)
        return 0
    _configure_logging(config)
    for variable in map(environment_variable, OPTIONS):
        if _is_url(text := os.environ.get(variable, "")):
            log.debug("%s: %r is a URL, and counts as not set", variable, text)
    try:
        return _serve(config, identity)
    except ListenError as error:
        log.error("%s: %s", sources.get(error.option, flag(error.option)), error.reason)
    except EngineError as error:
        log.error("%s: %s", sources.get("engine", flag("engine")), error.reason)
    except OSError as error:
        log.error("%s", error.strerror or error)
    return command.EXIT_FAILED


# ---- where the values come from ---------------------------------------------------------------


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="kecho",
        description="An echo server: every byte comes back, in order.",
        epilog="A flag wins over its environment variable, that over the default. "
        "SIGINT, SIGTERM and SIGHUP drain and exit, a second SIGINT or SIGTERM stops at once; "
        "SIGUSR1 prints counters. Under nohup SIGHUP is ignored.",
    )
    command.add_options(
        parser,
        OPTIONS,
        {described.name: described.default for described in fields(CommandConfig)},
        note=environment_variable,
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        default=False,
        help="print every option, its value and where that comes from, and exit",
    )
    parser.add_argument("--version", action="version", version=f"kecho {__version__}")
    return parser


def _gather(
    flags: Mapping[str, Any], environment: Mapping[str, str], sources: dict[str, str]
) -> dict[str, object]:
    """Values of the options that somebody gave; `sources` gets the flag or variable of each.

    A variable that is set but empty, or to a URL, counts as not set. Raises OptionError that names
    the source.
    """
    texts = dict(flags)
    for name in OPTIONS.keys() - flags.keys():
        variable = environment_variable(name)
        if not environment.get(variable) or _is_url(environment[variable]):
            continue
        if flags.keys().isdisjoint(_SAME_OPTION.get(name, ())):
            texts[name] = environment[variable]
    values: dict[str, object] = {}
    for name in OPTIONS.keys() & texts.keys():
        sources[name] = flag(name) if name in flags else environment_variable(name)
        spec, text = OPTIONS[name], texts[name]
        try:
            # Each --host is one address; in a variable several are parted by commas.
            values[name] = spec.check(tuple(text) if isinstance(text, list) else spec.parse(text))
        except ValueError as error:
            raise OptionError(sources[name], str(error)) from None
    return values


def _is_url(text: str) -> bool:
    """As tcp://10.0.0.7:12345, which Kubernetes puts into NAME_PORT of every container for a
    Service called name, and Docker for a link. No option has such a value."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def _gather_listen_fds(values: dict[str, object], sources: dict[str, str]) -> None:
    """What a service manager hands over counts as --fd in the environment does."""
    try:
        fds = take_listen_fds(os.environ)
    except ValueError as error:
        raise OptionError("LISTEN_FDS", str(error)) from None
    if fds and "fd" not in values:
        values["fd"], sources["fd"] = fds, "LISTEN_FDS"


# A flag for one wins over a variable for the other, too.
_SAME_OPTION = {"bench": ("dispatch",), "dispatch": ("bench",)}


def _print_config(config: CommandConfig, sources: Mapping[str, str]) -> None:
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


# ---- what it says -----------------------------------------------------------------------------


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"kecho: {level}{one_line(record.getMessage())}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields.update(getattr(record, "fields", {}))
        return json_text(fields)


class _JournalFormatter(logging.Formatter):
    """What another one makes of a record, with the priority that the journal takes off."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return with_priority(self._inner.format(record), record.levelno)


def _configure_logging(config: CommandConfig) -> None:
    handler = stderr_handler()
    formatter = _JsonFormatter() if config.log_format == "json" else _TextFormatter()
    handler.setFormatter(_JournalFormatter(formatter) if is_journal(2) else formatter)
    logging.raiseExceptions = False  # a reader of stderr that went away is no reason to stop
    log.handlers[:] = [handler]
    log.setLevel(config.log_level.upper())
    log.propagate = False


def _log_fields(message: str, event: str, **fields: object) -> None:
    log.info(message, extra={"fields": {"event": event, **fields}})


def _serve(config: CommandConfig, identity: privileges.Identity | None) -> int:
    sysctl.raise_descriptor_limit()
    server = Server.from_config(config)
    notifier = _notifier()

    def prepare() -> None:
        _say_descriptors(config)
        confine(config, identity, engine=server.engine)

    def start_to_serve(server: Server) -> None:
        _say_where(server)
        notifier.ready()

    status = 0
    try:
        stats = foreground.run(
            server,
            on_listening=prepare,
            on_start=start_to_serve,
            on_stop_signal=_say_stopping(server, notifier),
            report=_say_counters(),
            report_interval=config.stats_interval,
            heartbeat=notifier.alive,
            heartbeat_interval=notifier.watchdog_interval_s,
            is_last=True,
        )
    except ListenerLostError:  # said when it was seen
        stats, status = server.stats(), command.EXIT_FAILED
    finally:
        notifier.stopping()
        notifier.close()
    summary = _summary(stats, config.max_connections)
    _log_fields(f"stopped after {summary}", "stopped", stats=stats.to_dict())
    return status


def _say_descriptors(config: CommandConfig) -> None:
    """While the server is open and nobody is served yet: what it takes itself, workers' epoll sets
    and sockets, depends on more than the options."""
    limit = sysctl.descriptor_limit()
    left = max(0, limit - sysctl.open_descriptors() - _DESCRIPTORS_TO_COME)
    log.debug("descriptors: at most %d, some %d connections", limit, left)
    if config.max_connections is not None and config.max_connections > left:
        log.warning(
            "max-connections: %d are more than the %d that RLIMIT_NOFILE = %d leaves; further "
            "clients wait in the accept queue",
            config.max_connections,
            left,
            limit,
        )


def _notifier() -> Notifier:
    try:
        return Notifier(os.environ)
    except OSError as error:
        log.warning("%s", error.strerror or error)
        return Notifier({})


def _say_where(server: Server) -> None:
    config = server.config
    exposed = any(_is_exposed(address) for address in server.addresses)
    udp = server.udp_addresses
    engine = f", engine {server.engine}" if config.engine != "epoll" else ""
    limits = {name: getattr(config, name) for name in PUBLIC} if config.public else {}
    public = f", public: {describe_limits(limits)}" if limits else ""
    memory = server.socket_memory
    sockets = f", sockets {describe_size(memory)} each" if memory is not None else ""
    _log_fields(
        f"listening on {describe_addresses(server.addresses)}"
        f"{', ' + describe_addresses(udp, 'udp') if udp else ''}"
        f"{', reachable from other hosts' if exposed else ''}"
        f" ({_backlogs(server)}dispatch {config.dispatch}{engine}{public},"
        f" buffers {describe_size(server.max_buffer_memory)}{sockets},"
        f" {plural(server.threads, 'thread')})",
        "listening",
        addresses=server.addresses,
        udp_addresses=udp,
        exposed=exposed,
        backlog=min(server.backlogs, default=None),
        dispatch=config.dispatch,
        engine=server.engine,
        threads=server.threads,
        max_buffer_memory=server.max_buffer_memory,
        socket_memory=server.socket_memory,
        public=limits or None,
        pid=os.getpid(),
    )
    if exposed and not config.bounds_clients:
        log.warning(
            "other hosts can reach it, and one client can keep every place, by connections that "
            "are idle: --public sets limits (or --idle-timeout, --max-connections-per-ip, --allow)"
        )


def _backlogs(server: Server) -> str:
    """Of several listeners the least and the most; nothing of an inherited Unix socket's."""
    known = server.backlogs
    if not known:
        return ""
    return f"backlog {' to '.join(map(str, dict.fromkeys((min(known), max(known)))))}, "


def _is_exposed(address: object) -> bool:
    return (
        not isinstance(address, str)
        and not ipaddress.ip_address(
            address[0].partition("%")[0]  # type: ignore[index]
        ).is_loopback
    )


def _say_stopping(server: Server, notifier: Notifier) -> Callable[[int], None]:
    signals_seen: list[int] = []

    def say(number: int) -> None:
        if not signals_seen:
            notifier.stopping()
        signals_seen.append(number)
        name = signal.Signals(number).name
        if len(signals_seen) == 1:
            timeout = server.config.graceful_timeout
            again = "SIGTERM" if number == signal.SIGHUP else "again"
            _log_fields(
                f"{name}: draining for at most {timeout:g} s; {again} to stop at once", "draining"
            )
        elif len(signals_seen) == 2:
            _log_fields(f"{name}: stopping at once", "aborting")

    return say


def _say_counters() -> Callable[[Server], None]:
    earlier: list[Stats] = []

    def say(server: Server) -> None:
        now = server.stats()
        interval = now - earlier[0] if earlier else now
        earlier[:] = [now]
        rate = interval.echoes / interval.seconds if interval.seconds > 0 else 0.0
        _log_fields(
            f"{_summary(now, server.config.max_connections)}; "
            f"{rate:,.0f} echoes/s over {interval.seconds:.1f} s",
            "stats",
            stats=now.to_dict(),
            interval=interval.to_dict(),
        )

    return say


def _summary(stats: Stats, most: int | None = None) -> str:
    """most: connections, at once."""
    errors = {name: count for name, count in stats.errors.items() if count}
    closed = {name: count for name, count in stats.closed.items() if count}
    refused = {name: count for name, count in stats.refused.items() if count}
    parts = [
        f"{stats.seconds:.1f} s",
        f"{plural(stats.accepted, 'connection')} accepted",
        f"{stats.active:,} active" + (f" of {most:,} at most" if most is not None else ""),
        f"{plural(stats.echoes, 'echo', 'echoes')}",
        f"{stats.bytes_received:,} bytes in",
        f"{stats.bytes_sent:,} bytes out",
        f"closed {_counts(closed)}",
        f"errors {_counts(errors)}",
    ]
    if refused:
        parts.append(f"refused {_counts(refused)}")
    if stats.accept_pauses:
        parts.append(f"accepting paused {plural(stats.accept_pauses, 'time')}")
    if stats.dropped_syns:
        parts.append(f"{plural(stats.dropped_syns, 'SYN')} dropped")
    if stats.udp is not None:
        parts.append(_udp_summary(stats.udp))
    return parts[0] + ": " + ", ".join(parts[1:])


def _udp_summary(udp: UdpCounters) -> str:
    refused = {name: count for name, count in udp.refused.items() if count}
    errors = {name: count for name, count in udp.errors.items() if count}
    return (
        f"udp {udp.received:,} in, {udp.sent:,} out, {udp.dropped:,} dropped, "
        f"refused {_counts(refused)}, errors {_counts(errors)}"
    )


def _counts(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in counts.items()) or "none"

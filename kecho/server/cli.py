"""python -m kecho: the server as a command. It prints on stderr.

Exit status: 0 after a stop by SIGINT, SIGTERM or SIGHUP, 1 when the system refuses something or
closes a listener, 2 for wrong usage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from .. import command
from ..errors import EngineError, ListenerLostError, ListenError, OptionError
from ..options import defaults_of, flag
from ..system import sysctl
from . import announce, foreground
from .arguments import check_options
from .config import environment_variable
from .confinement import privileges
from .confinement.confine import confine
from .log_format import configure_logging
from .manual import ENGINES, LIMITS
from .server import Server
from .settings import OPTIONS, CommandConfig, gather, gather_listen_fds, is_url, print_config
from .systemd import Notifier

__all__ = ["main"]

log = logging.getLogger("kecho")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit status."""
    return command.run("kecho", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    flags = vars(_parser().parse_args(arguments))
    only_prints = flags.pop("print_config")
    sources: dict[str, str] = {}
    try:
        values = gather(flags, os.environ, sources)
        if not only_prints:
            gather_listen_fds(values, sources)
        config = CommandConfig(**check_options(CommandConfig, values))
        identity = privileges.find_identity(config.user) if config.user is not None else None
    except OptionError as error:
        source = sources.get(error.option, error.option)
        command.say_error("kecho", f"{source}: {error.reason}")
        return command.EXIT_USAGE
    if only_prints:
        print_config(config, sources)
        return 0
    configure_logging(config.log_level, config.log_format)
    for variable in map(environment_variable, OPTIONS):
        if is_url(text := os.environ.get(variable, "")):
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


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="kecho",
        usage="kecho [OPTION]...",
        description="Echo every byte that a client sends, in order, over TCP, Unix sockets or UDP.",
        epilog=f"{ENGINES}\n\n{LIMITS}\n\n"
        "Every option also reads an environment variable, such as KECHO_IDLE_TIMEOUT for "
        "--idle-timeout; the flag wins. BYTES take a suffix: 64K, 16M, 1G.\n\n"
        "SIGINT, SIGTERM and SIGHUP (unless ignored, as under nohup) drain and exit; a second "
        "SIGINT or SIGTERM stops at once. SIGUSR1 prints counters.",
    )
    command.add_options(parser, OPTIONS, defaults_of(CommandConfig))
    parser.group("Other").add_argument(
        "--print-config",
        action="store_true",
        default=False,
        help="Print every option, its value and where that comes from, and exit.",
    )
    parser.end_with_help(version=True)
    return parser


def _serve(config: CommandConfig, identity: privileges.Identity | None) -> int:
    sysctl.raise_descriptor_limit()
    server = Server.from_config(config)
    notifier = _notifier()

    def prepare() -> None:
        announce.say_descriptors(config)
        confine(config, identity, engine=server.engine)

    def start_to_serve(server: Server) -> None:
        announce.say_where(server)
        notifier.ready()

    status = 0
    try:
        stats = foreground.run(
            server,
            on_listening=prepare,
            on_start=start_to_serve,
            on_stop_signal=announce.say_stopping(server, notifier),
            report=announce.say_counters(),
            report_interval=config.stats_interval,
            heartbeat=notifier.alive,
            heartbeat_interval=notifier.watchdog_interval_s,
            is_last=True,
        )
    except ListenerLostError:  # it was reported when it was noticed
        stats, status = server.stats(), command.EXIT_FAILED
    finally:
        notifier.stopping()
        notifier.close()
    summary = announce.summary(stats, config.max_connections)
    announce.log_fields(f"stopped after {summary}", "stopped", stats=stats.to_dict())
    return status


def _notifier() -> Notifier:
    try:
        return Notifier(os.environ)
    except OSError as error:
        log.warning("%s", error.strerror or error)
        return Notifier({})
